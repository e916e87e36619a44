"""The decode loop: equal to transformers' generate where there is one model, and to p~ where there are two."""

import copy
import math

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from geodistill.data.record import Conversation
from geodistill.data.rows import respond
from geodistill.distill.cache import GrowingLayer, beginning, begun
from geodistill.distill.decode import Decoder, decode, log_probabilities, mix
from geodistill.models import assemble
from geodistill.models.row_model import RowModel

PROMPTS, LIMIT = 100, 12


@pytest.fixture(scope="module")
def pair(teacher, student):
    return RowModel(teacher), RowModel(student)


@torch.no_grad()
def write(models, weights, rows, pixels, forbidden, end, limit=LIMIT, seed=0, **settings):
    images = [m.project(m.see(pixels)) for m in models]
    generator = torch.Generator().manual_seed(seed)
    return decode(models, weights, rows, images, limit, forbidden, end, generator=generator, **settings)


@pytest.fixture(scope="module")
def generated(student, processor, messages, records, pictures, forbidden, tmp_path_factory):
    """The saved and loaded model, and what transformers' generate writes with it for each of the first prompts."""
    folder = tmp_path_factory.mktemp("model") / "student"
    assemble.save(student, processor, folder)
    model, loaded = assemble.load(folder)
    model.eval()
    prompts = [
        (messages(c.turns[: j + 1]), picture)
        for record, picture in zip(records, pictures, strict=True)
        for c in record.conversations
        for j in range(len(c.turns))
    ]
    found = []
    for message, picture in prompts[:PROMPTS]:
        text = loaded.apply_chat_template(message, add_generation_prompt=True)
        inputs = loaded(text=text, images=picture, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=LIMIT, suppress_tokens=forbidden.nonzero()[:, 0].tolist())
        found.append(ids[0, inputs.input_ids.shape[1] :].tolist())
    return model, found


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(("weights", "fixed"), [([1.0], False), ([0.0, 1.0], False), ([1.0], True)])
def test_greedy_equals_generate(n, weights, fixed, generated, pair, make_packer, questions, pixels, forbidden, end):
    model, expected = generated
    rows = make_packer(n).pack(questions)
    models = [RowModel(model)] if len(weights) == 1 else [pair[0], RowModel(model)]
    out = write(models, weights, rows, pixels, forbidden, end, greedy=True, fixed=fixed)
    tokens, length = out.tokens_RnT[rows.alive_Rn], out.length_Rn[rows.alive_Rn]
    found = [row[:k].tolist() for row, k in zip(tokens, length, strict=True)]
    assert len(expected) == PROMPTS
    assert found[:PROMPTS] == expected
    assert 0 < sum(answer[-1] == end for answer in expected) < PROMPTS
    assert len({tuple(answer) for answer in expected}) > PROMPTS / 2


def test_forbidden_tokens_are_never_sampled(pair, make_packer, questions, pixels, forbidden, end):
    rows = make_packer(8).pack(questions)
    greedy_models = [copy.deepcopy(m) for m in pair]
    for m in greedy_models:  # now a forbidden token leads almost everywhere
        m.model.lm_head.weight.data[forbidden] *= 6
    out = write(greedy_models, [0.2, 0.8], rows, pixels, forbidden, end, limit=32, keep=0)
    responses = respond(rows, out.tokens_RnT, out.length_Rn)
    token = responses.flat[0]
    assert len(token) > 1000
    assert not forbidden[token].any()
    assert torch.isfinite(out.mixture_M).all() and len(out.kept_MD) == len(token)
    with torch.no_grad():
        logits, _ = greedy_models[1](rows, responses, greedy_models[1].see(pixels))
    assert forbidden[logits.argmax(-1)].float().mean() > 0.7


def chi_square(count_V, probability_V) -> float:
    """Standardised: about 0 +- 1 where the counts follow the probabilities. Rare tokens are counted together."""
    total = count_V.sum()
    common = probability_V * total >= 5
    observed = torch.cat([count_V[common], count_V[~common].sum()[None]])
    expected = torch.cat([probability_V[common], probability_V[~common].sum()[None]]) * total
    freedom = len(observed) - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.2, 1.0), (0.2, 1.5), (0.7, 1.0), (1.0, 1.0)])
def test_sampling_follows_the_mixture(alpha, temperature, pair, make_packer, pixels, forbidden, end):
    packer = make_packer(8)
    (question,) = packer.questions("r", [Conversation("vqa", [("Where?", None)])])
    with torch.no_grad():
        one = packer.pack([[question]])
        responses = respond(one, torch.zeros(1, 1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long))
        p, q = (torch.softmax(m(one, responses, m.see(pixels[:1]))[0][0].double() / temperature, -1) for m in pair)
    p, q = (torch.where(forbidden, 0, x) / x[~forbidden].sum() for x in (p, q))

    rows = packer.pack([[question] * 4096])
    weights = [alpha, 1 - alpha]
    out = write(pair, weights, rows, pixels[:1], forbidden, end, limit=1, temperature=temperature)
    count = torch.bincount(out.tokens_RnT.flatten(), minlength=len(p)).double()
    assert count.sum() == 4096
    assert abs(chi_square(count, alpha * p + (1 - alpha) * q)) < 4
    for wrong in (0.0, 0.2, 0.4, 0.7, 1.0):
        if wrong != alpha:
            assert chi_square(count, wrong * p + (1 - wrong) * q) > 10


def test_finished_branches_get_no_more_tokens(pair, make_packer, questions, pixels, forbidden, end):
    rows = make_packer(8).pack(questions)
    out = write(pair, [0.2, 0.8], rows, pixels, forbidden, end)
    assert out.tokens_RnT.shape[2] == LIMIT and out.length_Rn.max() == LIMIT
    lengths = set()
    for tokens, length, finished, alive in zip(
        out.tokens_RnT.flatten(0, 1),
        *(x.flatten().tolist() for x in (out.length_Rn, out.finished_Rn, rows.alive_Rn)),
        strict=True,
    ):
        assert (tokens[length:] == 0).all()
        assert end not in tokens[: max(length - 1, 0)]
        assert finished == (alive and int(tokens[length - 1]) == end)
        assert (length > 0) == alive
        assert finished or not alive or length == LIMIT  # cut by the limit: marked as unfinished
        lengths.add(length)
    assert len(lengths) > 4 and not out.finished_Rn[rows.alive_Rn].all() and out.finished_Rn.any()


def test_a_longer_limit_continues_the_same_responses(pair, make_packer, questions, pixels, forbidden, end):
    """A cut response is the head of the longer one, and a finished one does not change."""
    rows = make_packer(8).pack(questions[:4])
    short, long = (write(pair, [0.2, 0.8], rows, pixels[:4], forbidden, end, limit=k, greedy=True) for k in (4, 12))
    assert torch.equal(short.length_Rn, long.length_Rn.clamp(max=4))
    assert torch.equal(long.tokens_RnT[..., :4], short.tokens_RnT)
    assert torch.equal(short.finished_Rn, long.finished_Rn & (long.length_Rn <= 4))


def test_a_seed_repeats_the_rollout(pair, make_packer, questions, pixels, forbidden, end):
    rows = make_packer(8).pack(questions[:2])
    a, b, c = (write(pair, [0.2, 0.8], rows, pixels[:2], forbidden, end, seed=s).tokens_RnT for s in (0, 0, 1))
    assert torch.equal(a, b) and (a.shape != c.shape or not torch.equal(a, c))


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_steps_of_fixed_shapes_write_the_same(alpha, pair, make_packer, questions, pixels, forbidden, end):
    """With rows that end early and buffers that are outgrown on the way."""
    rows = make_packer(3).pack(questions)
    plain, fixed = (
        write(pair, [alpha, 1 - alpha], rows, pixels, forbidden, end, limit=40, keep=0, fixed=choice) for choice in (False, True)
    )
    assert torch.equal(plain.tokens_RnT, fixed.tokens_RnT)
    torch.testing.assert_close(fixed.kept_MD, plain.kept_MD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fixed.mixture_M, plain.mixture_M, rtol=1e-4, atol=1e-4)


def test_mix():
    p, q = (torch.log_softmax(torch.randn(5, 7).masked_fill(torch.arange(7) == 2, -torch.inf), -1) for _ in range(2))
    torch.testing.assert_close(mix([p, q], [0.3, 0.7]).exp(), 0.3 * p.exp() + 0.7 * q.exp())
    assert torch.equal(mix([p, q], [0.0, 1.0]), q) and torch.equal(mix([p, q], [1.0, 0.0]), p)
    log_p = log_probabilities(torch.tensor([1.0, 2.0, 50.0]), 2.0, torch.tensor([False, False, True]))
    torch.testing.assert_close(log_p.exp(), torch.tensor([1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5)), 0.0]))


def test_the_growing_cache_holds_what_transformers_own_holds():
    """Random steps, with rows dropped on the way and the buffer outgrown several times."""
    generator = torch.Generator().manual_seed(0)
    growing, plain, rows = GrowingLayer(), DynamicLayer(), 6
    buffers = {}
    for step in range(60):
        columns = 40 if step == 0 else int(torch.randint(1, 5, (1,), generator=generator))
        keys, values = torch.randn(2, rows, 2, columns, 4, generator=generator)
        for ours, theirs in zip(growing.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(ours, theirs)
        assert growing.get_seq_length() == plain.get_seq_length()
        buffers[growing.buffer.data_ptr()] = growing.buffer  # held, so that no address comes twice
        if step in (20, 40):
            kept = torch.randperm(rows, generator=generator)[: rows - 2].sort().values
            rows -= 2
            growing.batch_select_indices(kept)
            plain.batch_select_indices(kept)
    assert 4 <= len(buffers) <= 8


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_rows_that_join_between_steps_write_what_they_write_alone(alpha, pair, make_packer, questions, pixels, forbidden, end):
    """Images join one after another, some twice and then from what was kept of them; some branches leave before their end."""
    packer, weights, limit = make_packer(3), [alpha, 1 - alpha], 20
    prefix = len(packer.prefix)
    order = [0, 1, 2, 0, 3, 4, 1, 5, 0, 6, 7, 7, 8, 2, 9]
    asked = [questions[image][at % 2 : at % 2 + 4] for at, image in enumerate(order)]
    decoder = Decoder(pair, weights, forbidden, end, fixed=False)
    assert decoder.can_join
    expected, written, kept, gone, rows_at_once = {}, {}, {}, set(), set()
    with torch.inference_mode():
        for at, image in enumerate(order):
            rows = packer.pack([asked[at]])
            alone = write(pair, weights, rows, pixels[image][None], forbidden, end, limit=limit, greedy=True)
            names = at * 100 + rows.question_Rn
            for name, tokens, length in zip(
                names[rows.alive_Rn].tolist(), alone.tokens_RnT[rows.alive_Rn], alone.length_Rn[rows.alive_Rn], strict=True
            ):
                expected[name] = tokens[:length].tolist()
            if image in kept:
                known = {i: begun(pair[i].model, [kept[image][i]] * len(rows.ids_RP)) for i in decoder.writers}
                decoder.join(rows, [None, None], names, torch.full_like(names, limit), known)
            else:
                images = [model.project(model.see(pixels[image][None])) for model in pair]
                found = decoder.join(rows, images, names, torch.full_like(names, limit))
                kept[image] = {i: beginning(cache, 0, prefix) for i, cache in found.items()}
            if at % 4 == 3:
                leaves = int(decoder.branches.number_B[-1])
                gone.add(leaves)
                decoder.leave(decoder.branches.number_B == leaves)
            for _ in range(at % 3 + 1 if at + 1 < len(order) else limit):
                if not len(decoder.branches):
                    break
                rows_at_once.add(len(decoder.branch_RK))
                step = decoder.step(lambda log_p: log_p.argmax(-1))
                for name, token in zip(step.number_B.tolist(), step.token_B.tolist(), strict=True):
                    written.setdefault(name, []).append(token)
    assert len(gone) == 3 and max(rows_at_once) > 4 and len(expected) > 40
    for name, tokens in expected.items():
        found = written.get(name, [])
        assert found == tokens[: len(found)] if name in gone else found == tokens, name
