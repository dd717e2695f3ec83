"""The best validation so far, and for how long there has been no better one."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmctl.train.events import Validated


@dataclass
class Best:
    """`step` of the lowest validation loss, all its `numbers`, and how many validations have come after it.

    Validations in front of the first step do not count. `seen` is the last one: a resumed run may repeat it.
    """

    step: int | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    waited: int = 0
    seen: int = 0

    def improves(self, validated: Validated) -> bool:
        """Take a validation up; whether it is the best."""
        if validated.step <= self.seen:
            return False
        self.seen = validated.step
        if self.step is not None and not validated.loss < self.numbers["loss"]:
            self.waited += 1
            return False
        self.step, self.numbers, self.waited = validated.step, validated.numbers, 0
        return True
