"""Packing of questions into image rows, and tokenisation as the processor does it."""

import pytest
import torch

from geodistill.data.record import BadRecord, Conversation
from geodistill.data.rows import PADDING, attends, respond
from geodistill.language import SHORT_ANSWER
from geodistill.models.assemble import forbidden_tokens


def conversations(n: int, answer: str | None = "yes") -> list[Conversation]:
    return [Conversation("vqa", [(f"Is there a {i}? {SHORT_ANSWER}", answer)]) for i in range(n)]


def multi_round(*answers: str | None) -> Conversation:
    return Conversation("conversation", [(f"question {i}", answer) for i, answer in enumerate(answers)])


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (8, [8]), (9, [4, 5]), (10, [5, 5]), (17, [5, 6, 6])])
def test_many_questions_split_evenly(make_packer, count, sizes):
    packer = make_packer(8)
    asked = packer.questions("r", conversations(count))
    rows = packer.pack([asked, asked[:1]])
    assert [len(row) for row in rows.questions] == [*sizes, 1]
    assert [q for row in rows.questions for q in row] == asked + asked[:1]
    assert rows.image_R.tolist() == [0] * len(sizes) + [1]
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
