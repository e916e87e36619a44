"""The procedure of MiniLLM's published code (Gu et al., 2024; microsoft/LMOps, folder minillm) for prompts with an image.

Ported, for one batch of prompts, one question a sequence, padded on the left:
  sampling   the mixture writes (student and teacher, a KV cache each); teacher and student read what it wrote, for reward and
             old log-probability; the student alone writes once more and both read that too, for the reverse KL in the log; the
             teacher reads the first responses again ("because of the fp16 loss") and so does the student: importance weights
  updates    of each inner epoch: the student reads (with gradient), and the teacher reads again
With the published four inner epochs (ppo-epochs of its scripts) the teacher writes once and reads 3 + 4 = 7 times, the student
writes twice and reads 3 + 4 times. A read is a forward pass of the whole transformers model, tower and head over all positions
included, as theirs is. Reward, its scaling and clipping, discounted return, whitening, clipped ratio and exact single-step term
are theirs.
Left out: the pre-training corpus, model parallelism, DeepSpeed, fp16 with loss scaling, gradient checkpointing, padding to fixed
lengths (theirs pads every prompt and response to the longest allowed, at a cost), masks of responses that have ended (here none
ends before the limit), smaller shuffled batches within an inner epoch, and the figures of the log but rev_kl.
Shapes: B sequences, P prompt columns, T response tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

ALPHA = 0.2  # the teacher's share in sampling that its scripts set


class Prompts(NamedTuple):
    """B sequences of an image and a question each, padded on the left."""

    ids_BP: Tensor
    mask_BP: Tensor  # 1: a token
    pixels: Tensor  # an image for every sequence, though some show the same


@dataclass
class Stored:
    """What MiniLLM's sampling leaves for its updates. Of each response token [B, T]: log q of the policy that wrote, the reward
    log p - log q (scaled, clipped), and the importance weight q / p~. rev_kl: of responses of the student alone, for the log.
    """

    prompts: Prompts
    tokens_BT: Tensor
    log_q_BT: Tensor
    reward_BT: Tensor
    weight_BT: Tensor
    rev_kl_BT: Tensor


class MiniLLM:
    """Sampling and loss on transformers models. forbidden: bool [V], tokens that no response may hold; limit: T."""

    scaling, most, discount, ratio_clip = 0.5, 100.0, 0.95, 0.2  # of the reward, of its size, of the return, of the ratio

    def __init__(self, student, teacher, forbidden: Tensor, limit: int, generator: torch.Generator | None = None):
        self.student, self.teacher, self.forbidden, self.limit = student, teacher, forbidden, limit
        self.generator = generator

    @torch.no_grad()
    def write(self, prompts: Prompts, mixed: bool) -> Tensor:
        """Responses [B, T] of the student, or of its mixture with the teacher."""
        writers = [(self.student, 1 - ALPHA), (self.teacher, ALPHA)] if mixed else [(self.student, 1.0)]
        caches = [DynamicCache(config=model.config.get_text_config()) for model, _ in writers]
        fed, mask = prompts.ids_BP, prompts.mask_BP
        written: list[Tensor] = []
        for _ in range(self.limit):
            probability = torch.zeros((), device=fed.device)
            for (model, share), cache in zip(writers, caches, strict=True):
                inputs = {"pixel_values": prompts.pixels} if not written else {}
                out = model(input_ids=fed, attention_mask=mask, past_key_values=cache, use_cache=True, **inputs)
                scores = out.logits[:, -1].float().masked_fill(self.forbidden, -torch.inf)
                probability = probability + share * scores.softmax(-1)
            fed = torch.multinomial(probability, 1, generator=self.generator)
            mask = torch.cat([mask, torch.ones_like(fed)], 1)
            written.append(fed)
        return torch.cat(written, 1)

    def read(self, model, prompts: Prompts, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [B, P + T, V], mask [B, P + T]) of a whole pass over prompts and responses."""
        ids = torch.cat([prompts.ids_BP, tokens_BT], 1)
        mask = torch.cat([prompts.mask_BP, torch.ones_like(tokens_BT)], 1)
        return model(input_ids=ids, attention_mask=mask, pixel_values=prompts.pixels, use_cache=False).logits, mask

    def judged(self, model, prompts: Prompts, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [B, T, V] that predict the responses, log-probability of their tokens [B, T]), without forbidden tokens."""
        logits, _ = self.read(model, prompts, tokens_BT)
        logits = logits[:, prompts.ids_BP.shape[1] - 1 : -1].float().masked_fill(self.forbidden, -torch.inf)
        return logits, logits.log_softmax(-1).gather(-1, tokens_BT[..., None])[..., 0]

    def reward(self, prompts: Prompts, tokens_BT: Tensor) -> Tensor:
        """log p of the tokens [B, T], over the whole vocabulary, from logits whose mean is taken off first."""
        logits, mask = self.read(self.teacher, prompts, tokens_BT)
        logits = logits.float()
        logits = (logits - logits.mean(-1, keepdim=True)) * mask[..., None]
        logits = logits[:, prompts.ids_BP.shape[1] - 1 : -1]
        return logits.gather(-1, tokens_BT[..., None])[..., 0] - logits.logsumexp(-1)

    @torch.no_grad()
    def sample(self, prompts: Prompts) -> Stored:
        """The sampling phase."""
        return self.stored(prompts, self.write(prompts, mixed=True))

    @torch.no_grad()
    def stored(self, prompts: Prompts, tokens_BT: Tensor) -> Stored:
        """The sampling phase behind its first writing."""
        reward = self.reward(prompts, tokens_BT)
        _, log_q = self.judged(self.student, prompts, tokens_BT)
        alone = self.write(prompts, mixed=False)
        ratio = self.reward(prompts, alone) - self.judged(self.student, prompts, alone)[1]
        rev_kl = ratio.exp() - 1 - ratio
        _, log_p = self.judged(self.teacher, prompts, tokens_BT)
        _, log_q_now = self.judged(self.student, prompts, tokens_BT)
        mixture = ((1 - ALPHA) * log_q.exp() + ALPHA * log_p.exp()).log()
        reward = ((reward - log_q_now) / self.scaling).clamp(-self.most, self.most)
        return Stored(prompts, tokens_BT, log_q_now, reward, (log_q_now - mixture).exp(), rev_kl)

    def advantage(self, reward_BT: Tensor) -> Tensor:
        """Discounted return from each token on, by the number of tokens from there, whitened."""
        T = reward_BT.shape[1]
        total, running = [], torch.zeros_like(reward_BT[:, 0])
        for t in range(T - 1, -1, -1):
            running = reward_BT[:, t] + self.discount * running
            total.append(running / (T - t))
        value = torch.stack(total[::-1], 1)
        return (value - value.mean()) * torch.rsqrt(value.var(unbiased=False) + 1e-8)

    def loss(self, stored: Stored) -> Tensor:
        """Of one inner epoch: the clipped long-term term and the exact single-step term, means over all tokens."""
        logits_q, log_q = self.judged(self.student, stored.prompts, stored.tokens_BT)
        advantage = self.advantage(stored.reward_BT)
        ratio = (log_q - stored.log_q_BT).exp() * stored.weight_BT
        clipped = ratio.clamp(1 - self.ratio_clip, 1 + self.ratio_clip)
        long = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
        with torch.no_grad():
            logits_p, _ = self.judged(self.teacher, stored.prompts, stored.tokens_BT)
        q = logits_q.softmax(-1)
        cross = -(q * logits_p.log_softmax(-1).masked_fill(self.forbidden, 0)).sum(-1)
        entropy = -(q * logits_q.log_softmax(-1).masked_fill(self.forbidden, 0)).sum(-1)
        return long + (cross - entropy).mean()
