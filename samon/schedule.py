"""When an update takes two passes, and how far it perturbs: the tail of a training, and rho over time."""

from dataclasses import dataclass

from samon.errors import UserError

RHO_SCHEDULES = ("constant", "linear", "lr")


@dataclass(frozen=True)
class Tail:
    """The last `fraction` of all updates, which take two passes; those before it are plain.

        tail = samon.Tail(total_updates=epochs * len(loader), fraction=0.3)
        for update, (x, y) in enumerate(batches):
            forward = lambda: loss_fn(model(x), y)
            samon.two_pass(optimizer, forward) if update in tail else plain_backward(forward)

    Another optimizer may take over there: `if update == tail.start: optimizer.replace_base("muon", lr_ratio=0.2)`.
    SAM late in training reaches about the accuracy of SAM throughout (Zhou et al. 2025, arXiv 2410.10373).

    Raises:
        UserError: `fraction` is not in (0, 1], or it is less than one update.
    """

    total_updates: int
    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"the tail must be a fraction in (0, 1] of all updates, got {self.fraction}")
        if self.start >= self.total_updates:
            raise UserError(f"the tail, {self.fraction:g} of {self.total_updates} updates, is less than one; raise it")

    @property
    def start(self) -> int:
        """Number of the first update with two passes."""
        return self.total_updates - round(self.fraction * self.total_updates)

    def __contains__(self, update: int) -> bool:
        return update >= self.start


@dataclass(frozen=True)
class RhoSchedule:
    """rho as a function of the update and the learning rate; set `optimizer.rho` to `at(update, lr)` before the step.

    `constant`  rho.
    `linear`    from rho_min to rho over `warmup` updates from update `start` on.
    `lr`        rho_min + (rho - rho_min) (lr - lr_min) / (lr_max - lr_min): GSAM (Zhuang et al. 2022, section 4.1).

    Raises:
        UserError: an unknown kind, or numbers that do not make a schedule.
    """

    kind: str
    rho: float
    rho_min: float = 0.0
    start: int = 0
    warmup: int = 0
    lr_max: float = 0.0
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in RHO_SCHEDULES:
            raise UserError(f"the schedule of rho must be one of {', '.join(RHO_SCHEDULES)}, got {self.kind!r}")
        if not 0 <= self.rho_min <= self.rho:
            raise UserError(f"rho_min={self.rho_min:g} must be between 0 and rho = {self.rho:g}")
        if (self.kind == "linear") != (self.warmup > 0):
            raise UserError(
                "a linear schedule of rho needs warmup (--rho-warmup), and no other schedule (--rho-sched) has one"
            )
        if self.kind == "lr" and not self.lr_min < self.lr_max:
            raise UserError("rho cannot follow a learning rate that is constant; use a scheduler that lowers it")

    def at(self, update: int, lr: float) -> float:
        """rho at this update, counted from 0 over the whole training."""
        if self.kind == "constant":
            return self.rho
        if self.kind == "linear":
            share = (update - self.start) / self.warmup
        else:
            share = (lr - self.lr_min) / (self.lr_max - self.lr_min)
        return self.rho_min + (self.rho - self.rho_min) * min(1.0, max(0.0, share))
