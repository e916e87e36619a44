"""Packing of questions into image rows, and tokenisation as the processor does it."""

import random

import pytest
import torch

from geodistill.data import packing
from geodistill.data.record import BadRecord, Conversation
from geodistill.data.rows import PADDING, STRIDE, Packer, Question, attends, padding, respond
from geodistill.language import IMAGE, SHORT_ANSWER
from geodistill.models.assemble import forbidden_tokens


def conversations(n: int, answer: str | None = "yes") -> list[Conversation]:
    return [Conversation("vqa", [(f"Is there a {i}? {SHORT_ANSWER}", answer)]) for i in range(n)]


def multi_round(*answers: str | None) -> Conversation:
    return Conversation("conversation", [(f"question {i}", answer) for i, answer in enumerate(answers)])


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (8, [8]), (9, [5, 4]), (10, [5, 5]), (17, [6, 6, 5])])
def test_many_questions_split_evenly(make_packer, count, sizes):
    packer = make_packer(8)
    asked = packer.questions("r", conversations(count))
    rows = packer.pack([asked, asked[:1]])
    assert [len(row) for row in rows.questions] == [*sizes, 1]
    assert [q for row in rows.questions for q in row] == asked + asked[:1]
    assert rows.image_I.tolist() == [0] * len(sizes) + [1]
    assert rows.alive_Rn.sum(1).tolist() == [*sizes, 1]


def test_a_row_holds_prefix_and_prompts(make_packer):
    packer = make_packer(3)
    asked = packer.questions("r", conversations(3))
    rows = packer.pack([asked, asked[:1]])
    prefix = len(packer.prefix)
    for r, row in enumerate(rows.questions):
        used = rows.branch_RP[r] != PADDING
        assert rows.ids_RP[r][rows.branch_RP[r] == 0].tolist() == packer.prefix
        assert rows.position_RP[r][rows.branch_RP[r] == 0].tolist() == list(range(prefix))
        for b, question in enumerate(row):
            mine = rows.branch_RP[r] == b + 1
            assert [*rows.ids_RP[r][mine].tolist(), int(rows.last_Rn[r, b])] == question.prompt
            assert [*rows.position_RP[r][mine].tolist(), int(rows.start_Rn[r, b])] == list(
                range(prefix, prefix + len(question.prompt))
            )
        assert int(used.sum()) == prefix + sum(len(q.prompt) - 1 for q in row)


def test_written_responses_follow_their_prompts(make_packer, questions):
    packer = make_packer(8)
    rows = packer.pack(questions[:5])
    responses = packer.answers(rows)
    token, sequence, step = responses.flat
    expected = [q.response for row in rows.questions for q in row]
    assert token.tolist() == [t for answer in expected for t in answer]
    assert step.tolist() == [t for answer in expected for t in range(len(answer))]
    assert torch.unique_consecutive(sequence, return_counts=True)[1].tolist() == [len(a) for a in expected]
    assert len(sequence.unique()) == len(expected)
    for r, row in enumerate(rows.questions):
        for b, question in enumerate(row):
            mine = responses.valid_RC[r] & (responses.branch_RC[r] == b + 1)
            assert responses.ids_RC[r][mine].tolist() == [question.prompt[-1], *question.response[:-1]]
            start = int(rows.start_Rn[r, b])
            assert responses.position_RC[r][mine].tolist() == list(range(start, start + len(question.response)))


def test_responses_lie_without_gaps(make_packer):
    packer = make_packer(3)
    rows = packer.pack([packer.questions("r", conversations(3)), packer.questions("r", conversations(1))])
    length = torch.tensor([[2, 0, 3], [1, 0, 0]])
    tokens = torch.arange(1, 19).reshape(2, 3, 3)
    responses = respond(rows, tokens, length)
    assert responses.valid_RC.sum(1).tolist() == [5, 1] and responses.valid_RC.shape == (2, 5)
    assert responses.flat[0].tolist() == [1, 2, 7, 8, 9, 10]
    assert responses.branch_RC[0].tolist() == [1, 1, 3, 3, 3]
    assert responses.branch_RC[1].tolist() == [1] + 4 * [PADDING]


def test_attention_rule(make_packer, questions):
    """The prefix is causal; a branch sees the prefix and itself, causally; nothing but padding sees padding."""
    packer = make_packer(4)
    rows = packer.pack([questions[0][:3], questions[1][:1]])
    branch, position = rows.branch_RP, rows.position_RP
    mask = attends(branch, position, branch, position)[:, 0]
    for r in range(len(mask)):
        for i in range(mask.shape[1]):
            for k in range(mask.shape[2]):
                q_branch, k_branch = int(branch[r, i]), int(branch[r, k])
                if q_branch == PADDING:
                    continue
                expected = k <= i and k_branch in (0, q_branch)  # in this region columns are in order
                assert bool(mask[r, i, k]) == expected
        assert mask[r].any(-1).all()  # a row of the mask that sees nothing makes NaN


def random_questions(rng: random.Random, image_tokens: int, count: int, prompt: tuple[int, int], answer: tuple[int, int]):
    """`count` questions with prompts and answers of random lengths, made of random words."""

    def words(least: int, most: int) -> list[int]:
        return [rng.randrange(10, 500) for _ in range(rng.randint(least, most))]

    return [Question(words(*prompt), words(*answer), "vqa") for _ in range(count)]


MIXTURES = {  # image tokens, questions of an image, tokens of a prompt, of an answer; questions_per_row
    "demo": (16, (3, 12), (15, 40), (2, 30), 12),
    "geochat": (1296, (1, 5), (60, 60), (5, 200), 8),
    "rsvqa": (256, (1, 100), (15, 35), (2, 3), 100),
    "rsvqa, 8 a row": (256, (1, 100), (15, 35), (2, 3), 8),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_padding_is_low(name, tokenizer):
    """Of prompts, and of prompts and answers: under a tenth; no question is lost; the same images make the same rows."""
    image_tokens, count, prompt, answer, most = MIXTURES[name]
    alone, shared = (Packer(tokenizer, IMAGE, image_tokens, 200, most, share_rows=share) for share in (False, True))
    rng = random.Random(0)
    totals = {"before": [0, 0, 0, 0.0, 0.0], "after": [0, 0, 0, 0.0, 0.0]}
    for _ in range(10):
        images = [random_questions(rng, image_tokens, rng.randint(*count), prompt, answer) for _ in range(8)]
        for which, packer in (("before", alone), ("after", shared)):
            rows = packer.pack(images)
            responses = packer.answers(rows)
            share = max(padding(rows), padding(rows, responses))
            columns = rows.ids_RP.shape[1] + responses.ids_RC.shape[1]
            found = (len(rows.ids_RP), columns, len(rows.ids_RP) * columns, 1e-6 * len(rows.ids_RP) * columns**2, share)
            totals[which] = [sum(pair) for pair in zip(totals[which], found, strict=True)]
            if packer is shared:
                assert share < packing.PADDING_SHARE
                assert sorted(rows.question_Rn[rows.alive_Rn].tolist()) == list(range(sum(len(asked) for asked in images)))
                assert torch.equal(packer.pack(images).ids_RP, rows.ids_RP)
    for which, total in totals.items():
        rows_, columns, tokens, cost, share = (value / 10 for value in total)
        print(f"{name}, {which}: {rows_:.1f} rows x {columns:.0f} = {tokens:.0f}; padding {share:.1%}; R P^2 {cost:.1f} M")


@pytest.mark.parametrize("budget", [512, 640, 1024, 2048])
def test_rows_hold_a_budget_of_tokens(budget, tokenizer):
    """Prompts and answers (of unknown ones the longest that may be) stay within it, but for a question that alone does not."""
    packer = Packer(tokenizer, IMAGE, 256, 40, 10**6, tokens_per_row=budget)
    rng = random.Random(1)
    images = [random_questions(rng, 256, rng.randint(1, 100), (15, 35), (2, 30)) for _ in range(8)]
    images[0][3] = Question([7] * 3000, [8], "vqa")
    for question in images[1]:
        question.response = None
    rows = packer.pack(images)
    known = {id(q): image for image, asked in enumerate(images) for q in asked}
    pieces = 0
    for r, row in enumerate(rows.questions):
        own = (rows.branch_RP[r] % STRIDE == 0).sum()
        tokens = int(own) + sum(len(q.prompt) - 1 + (40 if q.response is None else len(q.response)) for q in row)
        assert tokens <= budget or [len(q.prompt) for q in row] == [3000]
        codes = rows.branch_RP[r][rows.branch_RP[r] % STRIDE == 0].unique() // STRIDE
        for k in codes.tolist():
            mine = [q for b, q in enumerate(row) if int(rows.branch_Rn[r, b]) // STRIDE == k]
            assert {known[id(q)] for q in mine} == {int(rows.image_I[pieces + k])}
        pieces += len(codes)
    assert pieces == len(rows.image_I) and sum(len(row) for row in rows.questions) == sum(len(asked) for asked in images)


def test_pieces_are_as_few_as_can_be():
    sizes = [30, 10, 10, 10, 50, 20]
    assert packing.cut(100, sizes, 99, 0, True) == [6]
    assert packing.cut(100, sizes, 99, 160, False) == [4, 1, 1]
    assert packing.cut(100, [10] * 5, 99, 140, False) == [4, 1] and packing.cut(100, [10] * 5, 99, 140, True) == [3, 2]
    assert packing.cut(100, sizes, 2, 0, True) == [2, 2, 2]
    assert packing.cut(100, [5] * 3 + [900] + [5] * 3, 99, 160, True) == [3, 1, 3]
    assert packing.cut(100, [], 99, 160, True) == []


def test_more_questions_than_codes_make_several_pieces(tokenizer):
    packer = Packer(tokenizer, IMAGE, 4, 40, 10**6)
    asked = random_questions(random.Random(0), 4, STRIDE + 5, (2, 3), (1, 1))
    rows = packer.pack([asked])
    assert rows.image_I.tolist() == [0, 0] and int(rows.branch_Rn.max()) % STRIDE <= STRIDE - 1
    assert len(rows.branch_Rn[rows.alive_Rn]) == STRIDE + 5


def test_pieces_of_a_row_do_not_see_each_other(make_packer, questions):
    """Each token of a shared row stands as in a row of its piece alone, and sees the same tokens."""
    packer, single = make_packer(4, share_rows=True), make_packer(4)
    images = [questions[0][:4], questions[1][:1], questions[2][:2], questions[3][:1]]
    rows, alone = packer.pack(images), single.pack(images)
    assert len(rows.ids_RP) < len(rows.image_I) == len(alone.ids_RP) == 4
    responses, alone_responses = packer.answers(rows), single.answers(alone)
    place = {int(image): i for i, image in enumerate(alone.image_I)}

    def whole(rows, responses):
        parts = (rows.ids_RP, responses.ids_RC), (rows.branch_RP, responses.branch_RC), (rows.position_RP, responses.position_RC)
        ids, branch, position = (torch.cat(part, 1) for part in parts)
        return ids, branch, position, attends(branch, position, branch, position)[:, 0]

    ids, branch, position, mask = whole(rows, responses)
    single_ids, single_branch, single_position, single_mask = whole(alone, alone_responses)
    seen = 0
    for r in range(len(ids)):
        for k in range(int(branch[r].max()) // STRIDE + 1):
            mine = (branch[r] != PADDING) & (branch[r] // STRIDE == k)
            other = place[int(rows.image_I[seen])]
            used = single_branch[other] != PADDING
            assert torch.equal(ids[r][mine], single_ids[other][used])
            assert torch.equal(branch[r][mine] - k * STRIDE, single_branch[other][used])
            assert torch.equal(position[r][mine], single_position[other][used])
            assert torch.equal(mask[r][mine][:, mine], single_mask[other][used][:, used])
            assert not mask[r][mine][:, ~mine].any()
            seen += 1
    assert seen == 4 and mask.any(-1).all()


def test_unlabelled_conversations(make_packer):
    packer = make_packer(4)
    labelled = packer.questions("r", [*conversations(2), multi_round("a", "b")])
    hidden = packer.questions("r", [*conversations(2, answer=None), multi_round("a", "b").unlabelled()])
    assert [q.prompt for q in hidden] == [q.prompt for q in labelled[:3]]  # the second turn stands on a hidden answer
    assert all(q.response is None and q.references == [] for q in hidden)
    assert [q.response for q in packer.questions("r", conversations(1), with_answers=False)] == [None]
    responses = packer.answers(packer.pack([hidden]))
    assert not responses.valid_RC.any() and len(responses.flat[0]) == 0
    assert packer.answers(packer.pack([labelled[:1] + hidden])).valid_RC.sum() == len(labelled[0].response)


def test_multi_round_history(make_packer, tokenizer):
    packer = make_packer(4)
    first, second, third = packer.questions("r", [multi_round("one", "two", "three")])
    assert tokenizer.decode(first.prompt).strip() == "question 0 ASSISTANT:"
    assert (
        tokenizer.decode(third.prompt).strip()
        == "question 0 ASSISTANT: one</s>USER: question 1 ASSISTANT: two</s>USER: question 2 ASSISTANT:"
    )
    assert [tokenizer.decode(q.response) for q in (first, second, third)] == [" one</s>", " two</s>", " three</s>"]
    assert len(packer.questions("r", [multi_round("one", None, None)])) == 2


def test_references(make_packer):
    packer = make_packer(4)
    captions = Conversation("captioning", [("Describe.", "a"), ("Again.", "b")], references=["b", "c"])
    assert [q.references for q in packer.questions("r", [captions])] == [["a"], ["b", "c"]]


def test_response_over_the_limit(make_packer):
    long = multi_round("short", "many words " * 20)
    with pytest.raises(BadRecord, match="max_response=16") as error:
        make_packer(4, max_response=16).questions("record-7", [*conversations(1), long])
    assert (error.value.record, error.value.field) == ("record-7", "conversations[1].turns[1].answer")


def test_limit_counts_the_end_token(make_packer):
    length = len(make_packer(4).questions("r", conversations(1))[0].response)
    assert make_packer(4, max_response=length).questions("r", conversations(1))
    with pytest.raises(BadRecord):
        make_packer(4, max_response=length - 1).questions("r", conversations(1))


def test_tokens_equal_the_processor(make_packer, processor, messages, records, pictures):
    """Prefix, prompt and response are what the processor makes of the whole conversation, image tokens expanded."""
    packer = make_packer(8)
    for record, picture in zip(records, pictures, strict=True):
        asked = iter(packer.questions(record.id, record.conversations))
        for conversation in record.conversations:
            for j, (_, answer) in enumerate(conversation.turns):
                question = next(asked)
                text = processor.apply_chat_template(messages(conversation.turns[: j + 1]), add_generation_prompt=True)
                prompt = processor(text=text, images=picture).input_ids[0]
                assert packer.prefix + question.prompt == prompt
                whole = processor(text=f"{text} {answer}</s>", images=picture).input_ids[0]
                assert prompt + question.response == whole
    assert packer.prefix.count(packer.image_id) == packer.image_tokens == 16


def test_forbidden_tokens(tokenizer, forbidden, end):
    found = forbidden_tokens(tokenizer, len(tokenizer))
    assert torch.equal(found, forbidden)
    assert found.sum() == 3 and not found[end]
