"""Image rows are exact: n questions on one image give what each gives alone, and what plain transformers gives."""

import copy

import pytest
import torch

from geodistill.config import LossConfig
from geodistill.data.rows import respond
from geodistill.distill import losses
from geodistill.distill.decode import decode, log_probabilities
from geodistill.distill.step import Distiller
from geodistill.models.row_model import RowModel
from geodistill.models.vision import normalize
from oracle.reference import relative_error

IMAGES = (0, 3, 7, 11)  # records with different numbers of questions
ALPHA, LIMIT = 0.2, 16


@pytest.fixture(scope="module")
def asked(questions):
    return [questions[i] for i in IMAGES]


@pytest.fixture(scope="module")
def shown(pixels):
    return pixels[list(IMAGES)]


@pytest.fixture(scope="module")
def exact_teacher(teacher):
    return RowModel(copy.deepcopy(teacher).double())


@pytest.fixture(scope="module")
def exact_student(student):
    return RowModel(copy.deepcopy(student).double())


def log_softmax(logits, forbidden):
    """In the precision of `logits` (the library's own works in float32)."""
    return torch.log_softmax(logits.masked_fill(forbidden, -torch.inf), -1)


def plain_logits(model, processor, messages, answer, picture):
    """Logits [L, V] of plain transformers on the processor's ids with the answer behind them, and the answer's ids [L]."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=picture, return_tensors="pt")
    response = processor.tokenizer(f" {answer}</s>", add_special_tokens=False, return_tensors="pt").input_ids
    ids = torch.cat([inputs.input_ids, response], 1)
    output = model(
        input_ids=ids, pixel_values=inputs.pixel_values.to(model.dtype), attention_mask=torch.ones_like(ids), use_cache=False
    )
    return output.logits[0, inputs.input_ids.shape[1] - 1 : -1], response[0]


def objective(logits, token, sequence, step, logits_p, forbidden):
    """The on-policy loss of given responses, and its log-probabilities."""
    terms = losses.compare(logits, logits_p, token, 1.0, forbidden)
    old = terms.log_q.detach()
    mixture = torch.log(ALPHA * terms.log_p.exp() + (1 - ALPHA) * old.exp())
    batch = losses.Batch(token, sequence, step, mixture, old)
    single, long, _ = losses.reverse_kl(terms, batch, LossConfig(alpha=ALPHA))
    return single + long, log_softmax(logits, forbidden).detach()


def gradients(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def run_rows(student, teacher, packer, asked, pixels, forbidden):
    """(loss, log q [M, V], gradients) through the library's rows."""
    rows = packer.pack(asked)
    responses = packer.answers(rows)
    with torch.no_grad():
        logits_p, _ = teacher(rows, responses, teacher.see(pixels))
    logits, _ = student(rows, responses, student.see(pixels))
    loss, log_q = objective(logits, *responses.flat, logits_p, forbidden)
    loss.backward()
    return loss.detach(), log_q, gradients(student)


@pytest.fixture(scope="module")
def plain(exact_student, exact_teacher, processor, messages, records, pictures, forbidden):
    """(loss, log q [M, V], gradients) through plain transformers, one question at a time, in the order of the rows."""
    found_q, found_p, tokens, sequence, step = [], [], [], [], []
    for i in IMAGES:
        for conversation in records[i].conversations:
            for j in range(len(conversation.turns)):
                asked = messages(conversation.turns[: j + 1]), conversation.turns[j][1], pictures[i]
                logits, token = plain_logits(exact_student.model, processor, *asked)
                found_q.append(logits)
                with torch.no_grad():
                    found_p.append(plain_logits(exact_teacher.model, processor, *asked)[0])
                sequence.append(torch.full_like(token, len(sequence)))
                step.append(torch.arange(len(token)))
                tokens.append(token)
    responses = (torch.cat(x) for x in (tokens, sequence, step))
    loss, log_q = objective(torch.cat(found_q), *responses, torch.cat(found_p), forbidden)
    loss.backward()
    return loss.detach(), log_q, gradients(exact_student.model)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_written_answers_equal_plain_transformers(n, plain, exact_student, exact_teacher, make_packer, asked, shown, forbidden):
    loss, log_q, grad = run_rows(exact_student, exact_teacher, make_packer(n), asked, shown, forbidden)
    allowed = ~forbidden
    difference = float((log_q - plain[1])[:, allowed].abs().max())
    errors = relative_error(loss, plain[0]), relative_error(grad, plain[2])
    print(f"n={n}: log q differs by {difference:.1e}, loss {errors[0]:.1e}, gradient {errors[1]:.1e}")
    assert difference <= 1e-5
    assert max(errors) <= 1e-6


def test_float32_is_close(plain, student, teacher, make_packer, asked, shown, forbidden):
    _, log_q, grad = run_rows(RowModel(student), RowModel(teacher), make_packer(8), asked, shown, forbidden)
    torch.testing.assert_close(log_q[:, ~forbidden], plain[1][:, ~forbidden].float(), rtol=1e-5, atol=1e-5)
    assert relative_error(grad, plain[2]) <= 1e-4


def test_padding_and_batch_change_nothing(exact_student, make_packer, asked, shown, forbidden):
    """Each image alone, in a batch whose rows have other lengths, and in another order."""
    packer = make_packer(8)

    def run(order):
        rows = packer.pack([asked[i] for i in order])
        responses = packer.answers(rows)
        logits, _ = exact_student(rows, responses, exact_student.see(shown[list(order)]))
        return log_softmax(logits, forbidden)[:, ~forbidden].detach()

    rows = packer.pack(asked)
    assert (rows.branch_RP == -1).any() and not rows.alive_Rn.all()
    alone = [run([i]) for i in range(len(IMAGES))]
    torch.testing.assert_close(run([0, 1, 2, 3]), torch.cat(alone), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(run([2, 0, 3, 1]), torch.cat([alone[i] for i in (2, 0, 3, 1)]), rtol=1e-6, atol=1e-6)


def mixed_decode(teacher, student, rows, pixels, forbidden, end, greedy, alpha=ALPHA):
    images = [m.project(m.see(pixels)) for m in (teacher, student)]
    generator = torch.Generator().manual_seed(0)
    weights = [alpha, 1 - alpha]
    return decode([teacher, student], weights, rows, images, LIMIT, forbidden, end, greedy=greedy, keep=0, generator=generator)


@pytest.mark.parametrize("alpha", [ALPHA, 0.0])
def test_rows_write_the_same_tokens(alpha, exact_student, exact_teacher, make_packer, asked, shown, forbidden, end):
    found = {}
    for n in (1, 3, 8):
        rows = make_packer(n).pack(asked)
        with torch.no_grad():
            out = mixed_decode(exact_teacher, exact_student, rows, shown, forbidden, end, greedy=True, alpha=alpha)
        found[n] = out, respond(rows, out.tokens_RnT, out.length_Rn).flat[0]
    for n in (3, 8):
        assert torch.equal(found[n][1], found[1][1])
        torch.testing.assert_close(found[n][0].mixture_M, found[1][0].mixture_M, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[n][0].kept_MD, found[1][0].kept_MD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [ALPHA, 0.0, 1.0])
@pytest.mark.parametrize("n", [1, 8])
def test_rollout_keeps_the_teacher(n, alpha, exact_student, exact_teacher, make_packer, asked, shown, forbidden, end):
    """The kept distribution is a full forward of the teacher on the responses, so it need never run again."""
    rows = make_packer(n).pack(asked)
    with torch.no_grad():
        out = mixed_decode(exact_teacher, exact_student, rows, shown, forbidden, end, greedy=False, alpha=alpha)
        responses = respond(rows, out.tokens_RnT, out.length_Rn)
        log_p, log_q = (
            log_softmax(m(rows, responses, m.see(shown))[0], forbidden)[:, ~forbidden] for m in (exact_teacher, exact_student)
        )
    token = responses.flat[0]
    assert len(token) == len(out.mixture_M) == int(out.length_Rn.sum())
    kept = log_softmax(exact_teacher.head(out.kept_MD), forbidden)[:, ~forbidden]
    torch.testing.assert_close(kept, log_p, rtol=1e-5, atol=1e-5)
    mixture = torch.log(alpha * log_p.exp() + (1 - alpha) * log_q.exp())
    at = torch.full((len(forbidden),), -1)
    at[~forbidden] = torch.arange(int((~forbidden).sum()))
    torch.testing.assert_close(out.mixture_M.double(), mixture.gather(-1, at[token][:, None])[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["other image", "noise"])
def test_the_teacher_sees_the_image(change, teacher, student, make_packer, asked, shown, forbidden, end):
    packer = make_packer(8)
    distiller = Distiller(RowModel(student), RowModel(teacher), LossConfig(), forbidden, end, LIMIT, shared_tower=True)
    rows = packer.pack(asked)
    responses = packer.answers(rows)
    other = shown.roll(1, 0) if change == "other image" else shown + 0.3 * torch.randn(shown.shape)
    kept = [distiller.labelled(rows, responses, x, with_teacher=True).kept for x in (shown, other)]
    log_p, log_p_other = (log_softmax(distiller.teacher.head(hidden), forbidden).detach() for hidden in kept)
    change_M = (log_p.exp() - log_p_other.exp()).abs().sum(-1) / 2
    assert change_M.min() > 1e-4 and change_M.mean() > 0.01


def test_log_probabilities_equal_a_masked_softmax(forbidden):
    logits = 5 * torch.randn(4, len(forbidden))
    torch.testing.assert_close(log_probabilities(logits, 1.0, forbidden), log_softmax(logits, forbidden))


def test_normalize_equals_the_processor(processor, pictures, pixels):
    small = [picture.resize((32, 32), processor.image_processor.resample) for picture in pictures]
    images_BHWC = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).reshape(32, 32, 3) for p in small])
    torch.testing.assert_close(normalize(images_BHWC), pixels, rtol=1e-5, atol=1e-5)
