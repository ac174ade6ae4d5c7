"""What counts as a run going wrong quietly; fields are documented as in `configs.sections`."""

from __future__ import annotations

from configs.fields import Section, knob


class WatchConfig(Section):
    """Thresholds of the warnings of `utils.watch`; nothing here stops a run or changes what it learns."""

    window: int = knob(50, "answers, or logged steps, that a judgement rests on", "1", "ours", ge=2)
    repeated_share: float = knob(
        0.9, "warn when the commonest answer makes up this share of the last ones", "1", "ours", gt=0, le=1
    )
    seg_share: float = knob(
        0.5, "warn when fewer of the last answers than this share hold [SEG]", "1", "ours", ge=0, le=1
    )
    reward_drop: float = knob(
        0.5, "warn when the mean reward falls below this share of its best window", "1", "ours", ge=0, lt=1
    )
    entropy_floor: float = knob(0.02, "warn when the mean entropy of a token falls below", "nat", "ours", ge=0)
