"""What a sampler is, whatever generates: called with prompts and settings, it answers with completions.

  Generate     transformers' `generate`: anywhere; samples are keyed, and so the same again
  Continuous   transformers' continuous batching, on a GPU (fastpost.rollout.continuous)
  Colocated    vLLM in this process, Server: vLLM in another one (fastpost.rollout.vllm, .server)

All take their settings from one `Sampling`, and cut completions by one `Ends`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastpost.rollout.generate import generate
from fastpost.rollout.sampling import Completion, Sampling


class Sampler(Protocol):
    """num_generations completions of each prompt, in prompt-major order."""

    @property
    def reproducible(self) -> bool:
        """Whether the same call gives the same completions again. Where not, what a step consumed is recorded."""
        ...

    def update(self, model: Any) -> None:
        """Samples are of this model's weights from here on."""
        ...

    def __call__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int = 1,
        keys: Sequence[int] | None = None,
    ) -> list[Completion]: ...


@dataclass(frozen=True)
class Generate:
    """`generate`, of a model that is trained in place."""

    model: Any
    tokenizer: Any
    batch_size: int = 64  # completions decoded together

    @property
    def reproducible(self) -> bool:
        return True

    def update(self, model: Any) -> None:
        """Nothing to do: the weights are the model's own."""

    def __call__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int = 1,
        keys: Sequence[int] | None = None,
    ) -> list[Completion]:
        return generate(
            self.model,
            self.tokenizer,
            prompt_ids,
            sampling,
            num_generations=num_generations,
            keys=keys,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class Throughput:
    """New tokens, and the seconds that they took."""

    tokens: int
    seconds: float

    @staticmethod
    def of(completions: Sequence[Completion], seconds: float) -> Throughput:
        return Throughput(sum(len(completion.ids) for completion in completions), seconds)

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds


def faster(measured: dict[str, Throughput]) -> tuple[str, str]:
    """The name of the fastest, the first of equals; and a line that says so."""
    best = max(measured, key=lambda name: measured[name].per_second)
    rates = ", ".join(f"{name} {each.per_second:,.0f} tokens/s" for name, each in measured.items())
    return best, f"sampling by {best} from here on: {rates}"


@dataclass
class Tried:
    """Samples with each of several samplers in turn, and then with the one that was fastest."""

    candidates: dict[str, Sampler]
    say: Callable[[str], None]
    clock: Callable[[], float] = time.perf_counter  # completions are on the host: what made them is done
    measured: dict[str, Throughput] = field(default_factory=dict)
    chosen: Sampler | None = None

    @property
    def reproducible(self) -> bool:
        """Not before the choice is made: timing makes it."""
        return self.chosen is not None and self.chosen.reproducible

    def update(self, model: Any) -> None:
        for sampler in self.candidates.values() if self.chosen is None else [self.chosen]:
            sampler.update(model)

    def __call__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int = 1,
        keys: Sequence[int] | None = None,
    ) -> list[Completion]:
        if self.chosen is not None:
            return self.chosen(prompt_ids, sampling, num_generations, keys)
        name = next(name for name in self.candidates if name not in self.measured)
        began = self.clock()
        completions = self.candidates[name](prompt_ids, sampling, num_generations, keys)
        self.measured[name] = Throughput.of(completions, self.clock() - began)
        if len(self.measured) == len(self.candidates):
            best, line = faster(self.measured)
            self.chosen = self.candidates[best]
            self.say(line)
        return completions
