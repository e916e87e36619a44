"""The order of the data: a function of the seed alone, every group once an epoch, whatever the workers, resumable."""

from itertools import chain

import numpy as np
import pytest
from PIL import Image

from geodistill.config import TrainConfig
from geodistill.data.rows import Question
from geodistill.data.shards import Group
from geodistill.data.stream import MicroBatch, Order, augment, plan, square, to_micro_batch

GROUPS = [Group(f"train-{i // 5:05d}.parquet", i % 5, 8) for i in range(23)]
TRAIN = TrainConfig(steps=12, images_per_step=32, images_per_micro_batch=16)  # 4 groups a step, 2 a micro-batch


def steps(world: int, start: int = 0, seed: int = 0) -> list[list[Group]]:
    """The groups of each step over all workers."""
    order = Order(GROUPS, seed)
    parts = [plan(TRAIN, 8, rank, world, start) for rank in range(world)]
    micros = 32 // (16 * world)
    return [
        [order[g] for m in range(micros) for part in parts for g in part[s * micros + m]] for s in range(len(parts[0]) // micros)
    ]


def test_every_group_once_an_epoch_in_an_order_of_its_own():
    flat = list(chain.from_iterable(steps(1)))
    first, second = flat[:23], flat[23:46]
    assert len(flat) == 48 and set(first) == set(second) == set(GROUPS)
    assert first != second and first != GROUPS


def test_the_order_depends_on_the_seed_alone():
    assert steps(1) == steps(1) == steps(2)
    assert steps(1) != steps(1, seed=1)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_resumes_with_the_next_unseen_group(world):
    assert steps(world, start=5) == steps(world)[5:]


def test_a_wide_image_is_padded_with_the_mean_colour_and_a_square_one_is_only_resized():
    wide = square(Image.new("RGB", (40, 20), (255, 0, 0)), 20)
    assert wide.shape == (20, 20, 3) and tuple(wide[10, 10]) == (255, 0, 0)
    assert tuple(wide[0, 0]) == (122, 116, 104)
    assert np.array_equal(square(Image.new("RGB", (8, 8), (1, 2, 3)), 4), np.full((4, 4, 3), (1, 2, 3)))


def test_a_response_over_the_limit_is_set_aside_with_its_reason(records, make_packer):
    batch = to_micro_batch(records, make_packer(8, max_response=8), 32)
    assert len(batch.ids) == len(batch.pixels) == len(batch.questions) == len(records)
    assert batch.rejected and all("over the limit max_response=8" in reason for reason in batch.rejected)
    assert all(q.response is None or len(q.response) <= 8 for asked in batch.questions for q in asked)


def asked(task: str, text: str, *references: str) -> list[Question]:
    return [Question([1], [2], task, "", text, list(references))]


def test_augmentation_turns_only_what_stays_true_and_crops_only_where_the_class_alone_is_asked():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    questions = [
        asked("captioning", "Describe the image.", "A pier on the left of a beach."),
        asked("grounding", "[refer] where is the ship ?", "{<10><10><40><40>|<0>}"),
        asked("captioning", "Describe the image.", "Many ships in a harbour."),
        asked("scene_classification", "What is the class of this scene?", "port"),
    ]
    batch = MicroBatch(list("abcd"), pixels, questions)
    turns = {np.rot90(image, k).tobytes() for image in (pixels[2], pixels[2][::-1]) for k in range(4)}
    seen, cropped = set(), 0
    for seed in range(200):
        found = augment(batch, np.random.default_rng(seed)).pixels
        assert np.array_equal(found[:2], pixels[:2])
        seen.add(found[2].tobytes())
        cropped += sorted(found[3].ravel()) != sorted(pixels[3].ravel())
    assert seen == turns and cropped > 190
    assert np.array_equal(augment(batch, np.random.default_rng(7)).pixels, augment(batch, np.random.default_rng(7)).pixels)
