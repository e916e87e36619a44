"""Several images in a row are exact: every question gets what it gets in a row of its own."""

import copy

import pytest
import torch

from geodistill.data.rows import respond
from geodistill.distill.decode import decode
from geodistill.models.row_model import RowModel

ASKED = {0: 9, 3: 1, 7: 4, 11: 7, 14: 2}  # record -> how many of its questions
ALPHA, LIMIT = 0.2, 16


@pytest.fixture(scope="module")
def shared_and_alone(make_packer, questions):
    """The same questions in rows of several images, and each in a row of its own."""
    asked = [questions[record][:count] for record, count in ASKED.items()]
    shared, alone = make_packer(8, share_rows=True).pack(asked), make_packer(1).pack(asked)
    assert len(shared.ids_RP) < len(shared.image_I) < len(alone.ids_RP) == sum(ASKED.values())
    return shared, alone


@pytest.fixture(scope="module")
def shown(pixels):
    return pixels[list(ASKED)]


def exact(model):
    return RowModel(copy.deepcopy(model).double())


def places(rows):
    """(rows, branches) of the questions, in their order."""
    found = rows.alive_Rn.nonzero()
    return found[rows.question_Rn[rows.alive_Rn].argsort()].T


def in_order(rows, length_Rn):
    """Where the response tokens stand, in the order of the questions."""
    number = torch.repeat_interleave(rows.question_Rn[rows.alive_Rn], length_Rn[rows.alive_Rn])
    return torch.argsort(number, stable=True)


def mixture(models, rows, responses, shown, forbidden):
    """log p~ of each response token, [M], in one forward pass."""
    parts = [torch.log_softmax(m(rows, responses, m.see(shown))[0].masked_fill(forbidden, -torch.inf), -1) for m in models]
    return torch.log(ALPHA * parts[0].exp() + (1 - ALPHA) * parts[1].exp()).gather(1, responses.flat[0][:, None])[:, 0]


def test_written_answers(student, make_packer, shared_and_alone, shown, forbidden):
    """Log-probabilities over the vocabulary, and the gradients of their sum with a weight for each."""
    found = []
    for rows in shared_and_alone:
        model, responses = exact(student), make_packer(8).answers(rows)
        log_q = torch.log_softmax(model(rows, responses, model.see(shown))[0], -1)[:, ~forbidden]
        length = torch.zeros_like(rows.last_Rn)
        length[rows.alive_Rn] = torch.tensor([len(question.response) for row in rows.questions for question in row])
        log_q = log_q[in_order(rows, length)]
        (log_q * torch.sin(torch.arange(log_q.numel())).reshape(log_q.shape)).sum().backward()
        found.append((log_q.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (log_q, gradient), (log_q_alone, gradient_alone) = found
    torch.testing.assert_close(log_q, log_q_alone, rtol=1e-6, atol=1e-6)
    assert (gradient - gradient_alone).norm() <= 1e-6 * gradient_alone.norm()


@pytest.mark.parametrize("greedy", [True, False])
def test_responses(greedy, student, teacher, shared_and_alone, shown, forbidden, end):
    """Greedy ones are the same tokens. Sampled ones were drawn with the probabilities that each token has in a row of its own."""
    models = [exact(teacher), exact(student)]
    shared, alone = shared_and_alone
    with torch.no_grad():
        images = [model.project(model.see(shown)) for model in models]
        outs = []
        for rows in (shared, alone):
            generator = torch.Generator().manual_seed(0)
            weights = [ALPHA, 1 - ALPHA]
            outs.append(decode(models, weights, rows, images, LIMIT, forbidden, end, greedy=greedy, generator=generator))
        tokens, length = outs[0].tokens_RnT[*places(shared)], outs[0].length_Rn[*places(shared)]
        if greedy:
            assert torch.equal(length, outs[1].length_Rn[*places(alone)]) and length.sum() > 60
            assert torch.equal(tokens, outs[1].tokens_RnT[*places(alone)])
        responses = respond(alone, tokens[:, None], length[:, None])
        expected = mixture(models, alone, responses, shown, forbidden)
    assert torch.equal(alone.question_Rn[:, 0], torch.arange(len(alone.question_Rn)))
    found = outs[0].mixture_M[in_order(shared, outs[0].length_Rn)].double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
