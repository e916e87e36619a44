"""The serving engine: what requests get together is what each would get alone."""

import asyncio
import time

import numpy as np
import pytest
import torch

from geodistill.data.stream import square
from geodistill.models import assemble
from serving.engine import Engine, Full, Request, TooLate, content_key, number_of, sample
from serving.model import unfinished

LIMIT = 12


@pytest.fixture(scope="module")
def folder(student, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "student"
    assemble.save(student, processor, path)
    return path


@pytest.fixture
def engine(folder):
    made = Engine(folder, batch=6, queue=100)
    yield made
    made.close()


@pytest.fixture(scope="module")
def asked(folder, records, pictures):
    """(pixels, prompt) of the first questions of some records."""
    engine = Engine(folder)
    images = [square(picture, engine.reader.size) for picture in pictures[:8]]
    return [
        (image, engine.reader.prompt([(c.turns[0][0], None)]))
        for record, image in zip(records, images, strict=False)
        for c in record.conversations
    ]


@pytest.fixture(scope="module")
def alone(folder, asked):
    """What transformers' generate writes for each of them."""
    engine = Engine(folder)
    forbidden = engine.reader.forbidden.nonzero()[:, 0].tolist()
    found = []
    for image, prompt in asked:
        ids = torch.tensor([engine.packer.prefix + prompt])
        pixels = engine.model.prepare(torch.from_numpy(image.copy())[None])
        out = engine.model.model.generate(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=LIMIT,
            suppress_tokens=forbidden,
        )
        tokens = out[0, ids.shape[1] :].tolist()
        found.append(tokens[:-1] if tokens[-1] == engine.reader.end else tokens)
    return found


async def ask(engine, image, prompt, limit=LIMIT, **options):
    request = Request(prompt, content_key(image), image, limit, **options)
    async for _ in engine.answer(request):
        pass
    return request.tokens


def together(*coroutines):
    async def run():
        return await asyncio.gather(*coroutines)

    return asyncio.run(run())


def test_requests_that_arrive_at_any_time_get_what_generate_writes(engine, asked, alone):
    async def later(i, image, prompt):
        await asyncio.sleep(0.004 * (i * 7 % 23))
        return await ask(engine, image, prompt)

    found = together(*(later(i, *one) for i, one in enumerate(asked)))
    assert len(alone) > 50 and len({tuple(answer) for answer in alone}) > 25
    assert found == alone
    assert engine.counts["images_read"] == len({content_key(image) for image, _ in asked})  # every image was read once
    assert engine.counts["steps"] < sum(len(answer) for answer in alone) / 2  # and they were written together
    assert not engine.asked and not engine.waiting


def test_questions_on_one_image_share_a_row_while_it_is_written(folder, asked, alone, monkeypatch):
    """However many ask one after another: what they do not see any more leaves the row."""
    key = max({content_key(image) for image, _ in asked}, key=lambda k: sum(content_key(image) == k for image, _ in asked))
    mine = [i for i, (image, _) in enumerate(asked) if content_key(image) == key]
    engine = Engine(folder, batch=4, queue=100)
    rows, columns, step = [], [], engine.decoder.step

    def watched(*arguments):
        rows.append(len(engine.decoder.branch_RK))
        columns.append(engine.decoder.branch_RK.shape[1])
        return step(*arguments)

    monkeypatch.setattr(engine.decoder, "step", watched)
    times = 6
    found = together(*(ask(engine, *asked[i]) for _ in range(times) for i in mine))
    assert found == [alone[i] for _ in range(times) for i in mine]
    assert len(found) > 40 and set(rows) == {1} and engine.counts["images_read"] == 1
    needed = len(engine.packer.prefix) + 4 * (max(len(prompt) for _, prompt in asked) + LIMIT)
    assert max(columns) < 3 * needed
    engine.close()


@torch.inference_mode()
def test_a_question_on_one_of_many_images_gets_a_row_of_its_own(folder, asked):
    """In a row that another question has, all others would be fed a token more a step that is padding."""
    engine = Engine(folder)
    images = {content_key(image): (image, prompt) for image, prompt in asked}
    for number, (image, prompt) in enumerate([*images.values()][:4]):
        engine._join({content_key(image): [Request(prompt, content_key(image), image, LIMIT)]}, {})
        assert len(engine.decoder.branch_RK) == number + 1
    shown = [number_of(key) for key in images]
    assert [engine.decoder.row_for(one, 1) for one in shown[:5]] == [None] * 5
    assert (
        engine.decoder.row_for(shown[2], 2) is None and engine.decoder.row_for(shown[2], 4) == 2
    )  # 12 > 10 tokens a step; 20 = 20
    alone = torch.ones(len(engine.decoder.branches), dtype=torch.bool)
    alone[2] = False
    engine.decoder.leave(alone)
    engine.decoder._make_room({}, engine.decoder.branch_RK[:0])
    assert engine.decoder.row_for(shown[2], 1) == 0 == engine.decoder.row_for(shown[2], 4)


def test_what_is_kept_of_images_stays_in_its_bounds(folder, asked, alone):
    some = Engine(folder)
    together(ask(some, *asked[0]))
    one = some.prefixes_hold
    some.close()
    few = Engine(folder, queue=200, prefix_bytes=3 * one)
    assert together(*(ask(few, *one) for one in asked)) == alone
    assert len(few.prefixes) == 3 and few.prefixes_hold == 3 * one
    few.close()
    none = Engine(folder, prefix_bytes=0)
    assert together(*(ask(none, *one) for one in asked[:12])) == alone[:12]
    assert not none.prefixes
    none.close()


def test_a_draw_follows_from_its_seed_alone(engine, asked):
    def draws(*others):
        return together(*(ask(engine, *asked[at], temperature=1.0, top_p=0.9, seed=seed) for at, seed in [(3, 5), *others]))[0]

    first = draws()
    assert draws((3, 6), (4, 7), (9, 8)) == first
    assert together(ask(engine, *asked[3], temperature=1.0, top_p=0.9, seed=6))[0] != first


def test_who_leaves_frees_the_place(engine, asked, alone):
    end, engine.decoder.end = engine.decoder.end, -1  # no answer ends by itself

    async def run():
        long = [asyncio.create_task(ask(engine, *asked[i], limit=2000)) for i in range(6)]
        while len(engine.asked) < 6:
            await asyncio.sleep(0.001)
        for task in long:
            task.cancel()
        await asyncio.gather(*long, return_exceptions=True)
        engine.decoder.end = end
        return await asyncio.wait_for(ask(engine, *asked[7]), 20)

    assert asyncio.run(run()) == alone[7]
    assert not engine.asked and not len(engine.decoder.branches)


def test_too_many_and_too_late(folder, asked):
    engine = Engine(folder, batch=1, queue=2)

    async def run():
        tasks = [asyncio.create_task(ask(engine, *asked[0], limit=2000))]
        while not engine.asked:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(ask(engine, *asked[i])) for i in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await ask(engine, *asked[3])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        engine.decoder.end = -1  # no answer ends by itself
        start = time.monotonic()
        with pytest.raises(TooLate):
            await ask(engine, *asked[0], limit=10**5, deadline=start + 0.2)
        assert time.monotonic() - start < 5

    asyncio.run(run())
    engine.close()


def test_what_stops_the_model_is_told_to_all(engine, asked, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.decoder, "step", fails)
    monkeypatch.setattr("threading.excepthook", lambda _: None)

    async def run():
        found = await asyncio.gather(*(ask(engine, *one) for one in asked[:4]), return_exceptions=True)
        assert [str(error) for error in found] == ["out of memory"] * 4
        with pytest.raises(RuntimeError):
            await ask(engine, *asked[0])

    asyncio.run(run())
    assert engine.failed


def test_sampling_by_a_number():
    log_p = torch.log(torch.tensor([0.1, 0.6, 0.05, 0.25]))
    assert [sample(log_p, 1.0, 1.0, u) for u in (0.0, 0.59, 0.61, 0.84, 0.86, 0.94, 0.96, 0.999999)] == [1, 1, 3, 3, 0, 0, 2, 2]
    assert {sample(log_p, 1.0, 0.8, u) for u in np.linspace(0, 0.999, 50)} == {1, 3}
    assert {sample(log_p, 1.0, 0.1, u) for u in np.linspace(0, 0.999, 50)} == {1}
    draws = np.bincount([sample(log_p, 2.0, 1.0, u) for u in np.linspace(0, 0.9999, 4000)], minlength=4) / 4000
    expected = torch.softmax(log_p / 2, 0).numpy()
    assert np.abs(draws - expected).max() < 2e-3


def test_what_may_not_be_shown_yet():
    assert [unfinished("foo ST", ["STOP"]), unfinished("foo S", ["STOP", "x"]), unfinished("foo", ["STOP"])] == [2, 1, 0]
    assert unfinished("caf\ufffd", []) == 1 and unfinished("a\ufffd\ufffd", ["STOP"]) == 2  # a byte each
