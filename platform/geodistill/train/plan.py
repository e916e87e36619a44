"""What a stage costs before it is run: whether it fits a GPU, and if not what would help, and how long it takes.

Memory follows what transformers' Llama, distill/step.py, distill/decode.py and DeepSpeed 0.19 allocate: read from their
sources, and held to measurements by tests/unit/test_cost.py. Time is a roofline (Williams et al., CACM 2009): FLOPs and bytes
over the rates of a card and the shares of them that are reached. Units: bytes, FLOPs, seconds; GiB = 2**30 bytes.
Shapes as in data/rows.py: R rows, n questions, P prompt columns, T tokens of a response, M response tokens in all.
"""

import math
from copy import deepcopy
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

from transformers import AutoConfig, PreTrainedConfig

from geodistill.config import Config, ConfigError, ModelConfig, TrainConfig, changed
from geodistill.data.files import local
from geodistill.models.cost import Shape, architecture, shape
from geodistill.train.stage import Stage

GIB = 2**30
BUCKET = 500_000_000  # elements of DeepSpeed's reduce_bucket_size, allocated whole
LIVE = 1_000_000_000  # elements of its stage3_max_live_parameters


class Card(NamedTuple):
    """A GPU. memory: GiB that torch sees; rates by the maker's data sheet: dense TFLOP/s; bandwidth and link: GB/s."""

    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float  # to the other GPUs, one direction: NVLink, or PCIe 4.0 x16


CARDS = {
    "A100-40": Card(39.4, 312, 19.5, 1555, 300),
    "A100-80": Card(79.1, 312, 19.5, 2039, 300),
    "H100-80": Card(79.1, 989, 67, 3350, 450),
    "H200-141": Card(139.8, 989, 67, 4800, 450),
    "L40S-48": Card(44.4, 362, 91.6, 864, 32),
    "RTX4090-24": Card(23.6, 165, 82.6, 1008, 32),
}


class Load(NamedTuple):
    """What one worker has in hand at a time: a micro-batch of image rows."""

    images: int
    rows: int  # R
    questions: int  # n
    prompt: int  # P, columns of image and prompts
    tokens: int  # T
    micros: int  # micro-batches of a step

    @property
    def columns(self) -> int:
        return self.prompt + self.questions * self.tokens

    @property
    def responses(self) -> int:
        """M of a micro-batch."""
        return self.rows * self.questions * self.tokens


def load_of(config: Config, stage: Stage, patches: int) -> Load:
    """The micro-batches of a stage: every row has as many questions, and every response as many tokens, as `plan` says.

    For the worst case of memory set plan.response_tokens to the stage's max_response, plan.questions_per_image to all.
    """
    plan, train = config.plan, stage.train
    most = float(train.questions_per_row)
    if train.tokens_per_row:
        most = min(most, max(1, (train.tokens_per_row - patches) // (plan.prompt_tokens - 1 + plan.response_tokens)))
    pieces = math.ceil(plan.questions_per_image / most)
    questions = math.ceil(plan.questions_per_image / pieces)
    images = train.images_per_micro_batch
    prompt = patches + questions * (plan.prompt_tokens - 1)  # the last token of a prompt opens the response region
    micros = train.images_per_step // (images * config.cluster.workers)
    return Load(images, images * pieces, questions, prompt, plan.response_tokens, micros)


_made: dict[str, PreTrainedConfig] = {}  # it takes a tower's modules to make one


def models(config: Config, stage: Stage) -> dict[str, tuple[str, PreTrainedConfig]]:
    """ "teacher" (if there is one) and "student" -> (folder, its transformers config). No folder: made from the settings' sizes,
    where the stage starts from random weights, or from a folder that is not there yet."""

    def found(sizes: ModelConfig, vocabulary: int, *folders: str) -> tuple[str, PreTrainedConfig]:
        there = [folder for folder in folders if folder and (local(folder, weights=False) / "config.json").is_file()]
        if there:
            return there[0], AutoConfig.from_pretrained(local(there[0], weights=False))
        key = repr((sizes, vocabulary))
        if key not in _made:
            _made[key] = architecture(sizes, vocabulary)
        return "", deepcopy(_made[key])

    own, sizes, vocabulary = {}, config.teacher.model, config.data.vocabulary
    if stage.teacher:
        own["teacher"] = found(sizes, vocabulary, stage.teacher, sizes.init)
        vocabulary = own["teacher"][1].get_text_config().vocab_size
    sizes = getattr(config, stage.role).model
    return own | {"student": found(sizes, vocabulary, stage.weights, sizes.init)}


_shapes: dict[str, Shape] = {}  # a model is counted once, whatever is tried with it


def shapes(config: Config, stage: Stage) -> tuple[Shape | None, Shape]:
    """(teacher or None, student) of a stage."""

    def known(made: PreTrainedConfig, train: TrainConfig | None) -> Shape:
        frozen = getattr(config, stage.role).model.freeze_tower
        key = repr((made.to_json_string(), train and (train.tuning, train.lora), frozen))
        if key not in _shapes:
            _shapes[key] = shape(made, train, frozen)
        return _shapes[key]

    found = models(config, stage)
    teacher = known(found["teacher"][1], None) if "teacher" in found else None
    return teacher, known(found["student"][1], stage.train)


def frozen_bytes(teacher: Shape, bits: int, s: int) -> float:
    """A whole teacher: s bytes a weight; its language model's linear layers in `bits`, NF4 with a float32 scale for 64."""
    return s * (teacher.weights - teacher.linear) + {0: s, 8: 1, 4: 0.5 + 4 / 64}[bits] * teacher.linear


def memory(config: Config, stage: Stage) -> dict[str, dict[str, float]]:
    """Bytes of one worker by part, at each of the moments that may be the peak: moment -> part -> bytes.

    s bytes a weight and activation (2 in bf16, 4 in fp32), A trained weights, W workers, V vocabulary:
    - optimizer: 8 A of Adam's moments and 4 A of float32 weights (fp32: from ZeRO 1 on); over W from ZeRO 1 on.
    - gradients: s A at ZeRO 0; 4 A at ZeRO 1, and 2 A more in bf16; 4 A / W at ZeRO 2 and 3; and a bucket of `BUCKET` elements.
      They were measured with DeepSpeed 0.19.8 on one CPU. At the step: float32 copies of them (bf16 at ZeRO 0, fp32 at 1, 2);
      and AdamW's own temporaries, 8 A, where it is not fused (on CPUs).
    - activations: what autograd keeps, `_kept`, of every layer; with gradient checkpointing each layer's input,
      and all of one layer. Beside them at work: the losses on a chunk of [M, V], or one layer's backward pass, if that is more.
    - a rollout: both KV caches, the teacher's hidden states at the responses of the whole step, and at work the larger of one
      decode step's distributions and one layer of a prefill. Weights in shards are whole meanwhile.
    """
    teacher, student = shapes(config, stage)
    train, cluster, loss = stage.train, config.cluster, config.distill.loss
    load = load_of(config, stage, student.patches)
    s, workers, zero = (2 if cluster.precision == "bf16" else 4), cluster.workers, cluster.zero_stage
    on_policy, with_rows = train.method == "distill", train.method in ("distill", "kd")
    aligned = teacher is not None and on_policy and loss.align > 0
    learned_map = student.hidden * teacher.hidden if teacher and aligned and loss.align_map == "linear" else 0
    trained = student.trained + learned_map
    weights = s * (student.weights + learned_map)
    step_MV = 4.0 * load.rows * load.questions * student.vocabulary  # one decode step's logits in float32
    kept = s * load.responses * teacher.hidden if teacher and with_rows else 0.0

    held = {"student's weights": weights / (workers if zero == 3 else 1)}
    gathered = weights if zero == 3 else 0.0
    if teacher:
        whole = frozen_bytes(teacher, config.distill.teacher_bits, s)
        held = {"teacher's weights": whole / (workers if cluster.shard_teacher else 1)} | held
        gathered += whole if cluster.shard_teacher else 0.0
    share = workers if zero else 1
    held["optimizer"] = trained * (8 + (4 if zero or s == 2 else 0)) / share
    flat = zero == 1 and s == 2  # DeepSpeed's BF16_Optimizer: a float32 buffer for all gradients, and no bucket
    gradients = trained * {0: s, 1: 6 if flat else 4, 2: 4 / workers, 3: 4 / workers}[zero]
    bucket = s * (BUCKET if cluster.use_gpu else min(BUCKET, trained)) if zero and not flat else 0  # a CPU's is empty pages
    between = {"gradients": 4 * trained if flat else gradients if zero == 3 else 0, "reduce bucket": bucket if zero == 3 else 0}
    copied = 4 * trained / share if (s == 2 and zero == 0) or (s == 4 and zero in (1, 2)) else 0

    image = s * (3 * student.pixels**2 + (student.patches + 1) * student.tower_hidden)
    indices = 24 * load.rows * load.prompt + 33 * load.responses
    batches = load.micros * (2 if on_policy and loss.pretrain > 0 else 1)
    held["images, features"] = batches * (load.images * image + indices)
    if teacher and on_policy:
        held["images, features"] += load.micros * load.images * teacher.patches * teacher.hidden * s
    if kept:
        held["teacher's hidden states"] = load.micros * kept

    found = {}
    if teacher and on_policy:
        columns = _capacity(load)
        first, second = (load.rows * m.cache(columns, s) for m in (teacher, student))
        apart = loss.alpha == 0 or (loss.preset == "gkd" and loss.alpha < 1)  # a teacher without a share reads all at the end
        lockstep = load.columns if apart else load.prompt
        prefill = max(_forward(teacher, load, lockstep, s) - second, _forward(student, load, load.prompt, s))
        work = max(kept, 9 * step_MV, prefill - kept)
        found["rollout"] = between | {"gathered weights": gathered, "KV caches": first + second, "at work": work}
    elif teacher and with_rows:
        work = _forward(teacher, load, load.columns, s)
        found["teacher's pass"] = between | {"gathered weights": gathered, "at work": work}

    layer, behind = _kept(student, load, train, s, cluster.use_gpu)
    tokens, again = load.rows * load.columns, cluster.gradient_checkpointing
    kept = (
        student.layers * (tokens * student.hidden * s if again else layer)
        + behind
        + _before(student, teacher if aligned else None, load, s)
    )
    if student.trains_tower:
        kept += 20 * load.images * (student.patches + 1) * student.tower_hidden * student.tower_layers * s  # as a CLIP layer's
    backward = tokens * (student.intermediate + student.hidden) * s + (layer if again else 0)
    chunk = min(load.responses, max(1, cluster.loss_chunk // student.vocabulary))
    losses: float = chunk * student.vocabulary * (2 * s + 16 if with_rows else s + 12)  # logits, float32 copies
    losses += (
        2 * s * student.embedding if train.tuning == "full" and zero < 3 else 0.0
    )  # the head's gradient: a chunk's, and the sum
    found["update"] = {
        "gradients": gradients, "reduce bucket": bucket, "gathered weights": s * min(student.weights, LIVE) if zero == 3 else 0.0,
        "activations": kept, "at work": max(losses, backward),
    }  # fmt: skip
    temporary = 0 if cluster.use_gpu or not zero else 8 * trained / share
    found["optimizer's step"] = between | {"gradients": gradients, "at work": copied + temporary}
    return {moment: held | parts for moment, parts in found.items()}


def _kept(m: Shape, load: Load, train: TrainConfig, s: int, gpu: bool) -> tuple[float, float]:
    """Bytes that autograd keeps of one layer of the language model, and of what stands behind the last, for a micro-batch.

    Of each token, in the order of modeling_llama.py (d: hidden, a: heads times their width, f: intermediate):
    the inputs of both norms in float32 (2 d), and normalised where their weights are trained (2 d); queries, keys, values and
    output of the attention (4 a, keys and values repeated for grouped heads); gate, its activation and up (3 f); the inputs
    of linear layers whose weights are trained: d of the attention, d + f of the MLP. An adapter keeps its own dropped-out
    copy of its input (5 d + a + f in all) and the mask. SDPA keeps the row mask as numbers.
    """
    d, a, f = m.hidden, m.heads * m.head, m.intermediate
    tokens = load.rows * load.columns
    norms = d if train.tuning in ("full", "bias", "attention_and_norm") else 0
    numbers = 2 * norms + 4 * a + 3 * f + {"full": 2 * d + f, "attention_and_norm": d}.get(train.tuning, 0)
    size = 4 * (2 * d + m.heads) + s * numbers
    if train.tuning == "lora":
        inputs = 5 * d + a + f if train.lora.dropout else 2 * d + f
        size += s * (inputs + 7 * train.lora.rank) + (inputs * (1 if gpu else s) if train.lora.dropout else 0)
    return tokens * (size + load.columns * s), tokens * (4 * d + s * (norms + d))


def _before(student: Shape, teacher: Shape | None, load: Load, s: int) -> float:
    """Bytes kept before the first layer: projector, embeddings, the row mask, and the learned map with its float32 target."""
    images, d = load.images * student.patches, student.hidden
    mapped = images * teacher.hidden * (s + 4 + (4 if s == 2 else 0)) if teacher else 0
    return images * 3 * d * s + load.rows * ((load.columns + student.patches) * d * s + load.columns**2) + mapped


def _forward(m: Shape, load: Load, columns: int, s: int) -> float:
    """Bytes at work in one layer of a forward pass without gradients: in its attention or its MLP, whichever is more."""
    tokens = load.rows * columns
    layer = max(5 * m.hidden * s + columns * (s + 1), (2 * m.hidden + 3 * m.intermediate) * s, 8 * m.hidden * s)
    return tokens * (layer + m.hidden * s + columns) + 2 * load.images * m.patches * m.hidden * s


def _capacity(load: Load) -> int:
    """Columns of the buffer in which a KV cache grows (cache.GrowingLayer), at the end of a rollout."""
    room = 0
    for used in range(load.prompt, load.columns + 1, load.questions):
        if used > room:
            room = used + min(used // 2, 256)
    return room


def peak(config: Config, stage: Stage) -> tuple[str, dict[str, float]]:
    """The moment of the most memory, and its parts."""
    return max(memory(config, stage).items(), key=lambda moment: sum(moment[1].values()))


def available(config: Config) -> float:
    """GiB of the planned card that tensors may take."""
    return (config.plan.memory or CARDS[config.plan.gpu].memory) - config.plan.reserve


def _key(config: Config, stage: Stage) -> str:
    """The config key of a stage's training settings, such as distill.train."""
    known = ("teacher.first", "teacher.train", "distill.warm_start", "distill.train")
    return next((key for key in known if attrgetter(key)(config) is stage.train), "student.train")


def remedies(config: Config, stage: Stage, gib: float) -> tuple[list[tuple[str, float]], bool]:
    """What brings a stage into `gib` GiB: ([(override, peak in GiB once it and, if `together`, those before hold)], together).

    Those that do alone, where there are any; else the fewest that a greedy search finds, or all that help. What leaves the
    result as it is comes before what changes it (quantised teacher, adapters, bf16).
    """
    key, micro = _key(config, stage), stage.train.images_per_micro_batch
    smaller = [f"{key}.images_per_micro_batch={micro // k}" for k in (2, 4, 8, 16, 32) if micro % k == 0]
    cluster = [
        f"cluster.{item}" for item in ("gradient_checkpointing=true", "zero_stage=2", "zero_stage=3", "shard_teacher=true")
    ]
    other = ["distill.teacher_bits=8", "distill.teacher_bits=4", f"{key}.tuning=lora", "cluster.precision=bf16"]

    def tried(overrides: list[str]) -> float:
        try:
            new = changed(config, overrides)
        except ConfigError:  # they contradict each other, or the data
            return math.inf
        return sum(peak(new, replace(stage, train=attrgetter(key)(new)))[1].values()) / GIB

    alone = [(override, tried([override])) for override in (*cluster, *smaller, *other)]
    enough = [(override, need) for override, need in alone if need <= gib]
    if enough:
        return enough, False
    chosen: list[tuple[str, float]] = []
    now = tried([])
    for options in ([*cluster, *smaller], other):
        while options and now > gib:
            need, best = min((tried([*(o for o, _ in chosen), option]), option) for option in options)
            if need > 0.99 * now:
                break
            chosen, now = [*chosen, (best, need)], need
            options = [option for option in options if option.split("=")[0] != best.split("=")[0]]
    return chosen, True


def verdict(config: Config, stage: Stage, gib: float, card: str) -> tuple[bool, str]:
    """Does a stage fit the `gib` GiB that are free on `card`? And in words; where it does not, with what would help."""
    moment, parts = peak(config, stage)
    need, (largest, size) = sum(parts.values()) / GIB, max(parts.items(), key=lambda part: part[1])
    words = f"{need:.1f} GiB at the peak ({moment}), {gib:.1f} GiB free on {card}"
    if need <= gib:
        return True, f"{stage.name} fits: {words}"
    found, together = remedies(config, stage, gib)
    tried = ", ".join(f"{override} (-> {left:.1f} GiB)" for override, left in found)
    advice = f"try {'together' if together else 'one of'} {tried}"
    if not found or found[-1][1] > gib:
        advice = "take a larger card, more workers or smaller models" + (f"; it helps, but not enough: {tried}" if found else "")
    return False, f"{stage.name} does not fit: {words}; {largest} alone: {size / GIB:.1f} GiB; {advice}"


def check_memory(config: Config, stage: Stage, gib: float) -> None:
    """Raise ValueError, with what would help, where a stage trains on GPUs and needs more than the `gib` GiB that each has."""
    if not config.cluster.use_gpu:
        return
    fits, words = verdict(config, stage, gib - config.plan.reserve, f"a GPU of {gib:.1f} GiB")
    if not fits:
        raise ValueError(words)


class Cost(NamedTuple):
    """What one worker does in one step: FLOPs, bytes of its memory that it reads, bytes that it sends."""

    flops: float
    read: float = 0.0
    sent: float = 0.0

    def seconds(self, config: Config) -> float:
        """The longest of the three, at the shares of the planned card's rates that are reached."""
        plan, card = config.plan, CARDS[config.plan.gpu]
        rate = (card.bf16 if config.cluster.precision == "bf16" else card.fp32) * 1e12 * plan.matmul_share
        link = plan.network or card.link * plan.bandwidth_share
        return max(self.flops / rate, self.read / (card.bandwidth * 1e9 * plan.bandwidth_share), self.sent / (link * 1e9))


def work(config: Config, stage: Stage) -> dict[str, Cost]:
    """One step of one worker by part.

    tower: each image once, where teacher and student share a frozen tower, else twice. prefill: both models read R P tokens.
    decode: T times those that write read their weights and KV caches, for R n tokens: both; the student alone with alpha = 0, the
    teacher with alpha = 1; with gkd each alone in its share of the micro-batches. teacher's pass: over the responses, with kd and
    where it does not write. update: the student's forward
    pass; the gradient of its activations, as much again; that of the weights it trains; with gradient checkpointing another
    forward pass. all-reduce: a ring sends 2 (W - 1) / W of the gradients (Patarasuk and Yuan, 2009), once a step, from ZeRO 2
    on at every pass; ZeRO gathers the weights after the step, ZeRO 3 also twice a pass. Left out: AdamW, data, checkpoints.
    """
    teacher, student = shapes(config, stage)
    cluster, train, load = config.cluster, stage.train, load_of(config, stage, student.patches)
    s, zero, ring = (2 if cluster.precision == "bf16" else 4), cluster.zero_stage, 1 - 1 / cluster.workers
    R, X, M = load.rows, load.rows * load.columns, load.responses
    on_policy, with_rows = train.method == "distill", train.method in ("distill", "kd")
    passes = load.micros * (2 if on_policy and config.distill.loss.pretrain > 0 else 1)
    found = dict.fromkeys(("tower", "prefill", "decode", "teacher's pass", "update", "all-reduce"), Cost(0.0))
    found["tower"] = Cost(load.images * student.image_flops * passes)
    sent = ring * (2 * (s if zero != 1 else 4) * student.trained * (passes if zero >= 2 else 1))
    sent += ring * s * (student.trained * (zero in (1, 2)) + student.weights * (2 * passes + 1) * (zero == 3))
    if teacher and with_rows:
        towers = ((m.tower_hidden, m.tower_layers, m.patches) for m in (teacher, student))
        if student.trains_tower or len(set(towers)) > 1:
            found["tower"] = Cost(load.images * (student.image_flops * passes + teacher.image_flops * load.micros))
        stored = frozen_bytes(teacher, config.distill.teacher_bits, s)
        sent += ring * stored * cluster.shard_teacher
        if on_policy:
            alpha, middle = config.distill.loss.alpha, load.prompt + load.questions * load.tokens // 2
            apart = config.distill.loss.preset == "gkd"
            shares = (
                (alpha, 1 - alpha) if apart else (float(alpha > 0), float(alpha < 1))
            )  # of the micro-batches that each writes
            writers = tuple(zip((teacher, student), shares, strict=True))
            found["teacher's pass"] = Cost(load.micros * (1 - shares[0]) * teacher.text_flops(X, load.columns, 0))
            step = sum(share * m.text_flops(R * load.questions, middle, R * load.questions) for m, share in writers)
            weights = shares[0] * stored * teacher.language / teacher.weights + shares[1] * s * student.language
            read = weights + R * sum(share * m.cache(middle, s) for m, share in writers)
            found["prefill"] = Cost(
                load.micros * sum(share * m.text_flops(R * load.prompt, load.prompt, 0) for m, share in writers)
            )
            found["decode"] = Cost(load.micros * load.tokens * step, load.micros * load.tokens * read)
        else:
            found["teacher's pass"] = Cost(load.micros * teacher.text_flops(X, load.columns, 0))
    factor = 2 + min(1.0, student.trained / student.language) + cluster.gradient_checkpointing
    found["update"] = Cost(passes * factor * student.text_flops(X, load.columns, M))
    if teacher and with_rows:  # the teacher's head, on what was kept of its pass
        found["update"] = Cost(found["update"].flops + load.micros * teacher.text_flops(0, 0, M))
    found["all-reduce"] = Cost(0.0, 0.0, sent)
    return found
