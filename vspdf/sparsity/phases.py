"""The engine of phases: takes a model and its optimizer through them, in our trainer and in any other loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from vspdf.errors import UserError, check_whole, did_you_mean, require
from vspdf.pattern import Pattern
from vspdf.sparsity.amounts import Amounts, only_added, warn_once
from vspdf.sparsity.eligible import sparsifiable
from vspdf.sparsity.from_files import MaskFile
from vspdf.sparsity.layer import SparseLinear, is_sharded, patterns_of, sparse_layers
from vspdf.sparsity.moves import grow, move
from vspdf.sparsity.optimizer import check_optimizer, forget
from vspdf.sparsity.revived import RevivedWarmup, take_step
from vspdf.sparsity.schedule import Phase, phase_of
from vspdf.sparsity.scores import DenseGradients
from vspdf.sparsity.surgery import adopt, sparsify
from vspdf.sparsity.timeline import Stretch, Timeline
from vspdf.sparsity.turnover import Turnover
from vspdf.sparsity.wrapped import begun_with

log = logging.getLogger("vspdf")
_OPTIONS = ("include", "exclude", "rescale", "backend", "memory")  # of `sparsify`, which a phase may ask for later


class Phases:
    """Takes a model and its optimizer through phases of sparsity, in any training loop.

    Parameters
    ----------
    phases : sequence of (sparsity, steps), of (sparsity, steps, lr), or of `vspdf.Phase`
        In steps of the optimizer; the last phase goes on for as long as the training does. `lr` is the peak of the
        phase's learning rate, for `scheduler`; default: that of the optimizer. A `Phase` may have a `schedule`, so that
        it densifies in steps, `layers` with sparsities of their own, and an `algorithm` that moves its masks.
    seed : int
    moments : {"keep", "reset"}, optional
        At the start of a phase, the optimizer keeps its state of weights that were there before, or forgets the state
        of the whole model. Default: as each phase says, "keep" if it says nothing.
    revived_warmup : int, optional
        Steps over which updates of newly added weights ramp up; about 50-100 for a beta2 above 0.98. Default: as each
        phase says.
    init_method : str, optional
        Of the first masks, as `vspdf.sparsify` has it. Default: as the first phase says.
    **options
        Of `vspdf.sparsify`: `include`, `exclude`, `rescale`, `backend`, `memory`.

    Raises
    ------
    UserError
        If a phase would drop weights, a sparsity or a number of steps is impossible, an option is unknown, or `rescale`
        has nothing to scale.

    Examples
    --------
    >>> phases = vspdf.Phases([(0.9, 900, 3e-3), (0.0, 100, 1e-3)])
    >>> phases.start(model)
    >>> optimizer = torch.optim.AdamW(vspdf.parameter_groups(model, 0.1), lr=1e-3)
    >>> scheduler = phases.scheduler(optimizer)
    >>> for step, batch in enumerate(batches):
    ...     phases.at(step, model, optimizer)
    ...     model(batch).backward()
    ...     phases.step(optimizer)
    ...     scheduler.step()
    ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        phases: Sequence[tuple[float, int] | tuple[float, int, float] | Phase | Amounts],
        *,
        seed: int = 0,
        moments: str | None = None,
        revived_warmup: int | None = None,
        init_method: str | None = None,
        **options: Any,
    ) -> None:
        require(bool(phases), "Phases needs at least one phase, e.g. [(0.9, 900), (0.0, 100)].")
        of_all = {"moments": moments, "revived_warmup": revived_warmup, "init_method": init_method}
        for name in options:
            require(
                name in _OPTIONS, f"Phases has no option '{name}'.{did_you_mean(name, (*_OPTIONS, *of_all, 'seed'))}"
            )
        given: dict[str, Any] = {name: value for name, value in of_all.items() if value is not None}
        self.phases: list[Amounts] = []
        check_whole("seed", seed, least=0)
        self.seed, self.options = int(seed), options
        for i, phase in enumerate(phases):
            if not isinstance(phase, (Phase, Amounts)):
                phase = phase_of(f"phases.{i}", phase)
            phase = replace(phase, **given)
            if isinstance(phase, Phase):
                phase = phase.resolved(f"phases.{i}", self.phases[-1] if i else None)
            self.phases.append(phase)
        if options.get("rescale") and self.phases[0].begins_dense:
            raise UserError("rescale = True does nothing: it scales first masks, and the first phase begins dense.")
        self._time = Timeline(self.phases)
        self.stages = self._time.stages
        self.before: dict[str, Pattern] = {}  # of layers that the last switch changed, how they were
        self.revived: RevivedWarmup | None = None
        self.turnover: Turnover | None = None  # of masks that move
        self._now: int | None = None
        self._weights: dict[str, int] = {}  # of each layer that is sparse or could be
        self._model: nn.Module | None = None
        self._seen: int | None = None  # the last step that `at` was called for
        self._first = 0  # that one after which it goes on: of `start` 0
        self._changed: int | None = None  # the last step before which masks changed
        self._missed = False  # whether an update was, and that has been said
        self._gradients: DenseGradients | None = None  # for RigL, from the step before an update

    # -- where the model is ------------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """Whether a model was brought into the form of a phase."""
        return self._now is not None

    @property
    def now(self) -> Stretch:
        """The phase and stage whose form the model has."""
        return self.stages[self._now or 0]

    @property
    def sparsity(self) -> float:
        """Sparsity that the model has now, over all weights of its layers that can be sparse."""
        if self._model is not None and self.phases[self.now.phase].rules == "cstorch":  # whole weights are dropped
            return self._found(self._model)[0]
        return self._sparsity(self.now)

    def sparsities(self, steps: int) -> list[float]:
        """Those that the model has one after the other in a training of so many steps."""
        return [self._sparsity(stage) for stage in self.stages if stage.start < steps]

    @property
    def dense_gradients(self) -> DenseGradients | None:
        """What RigL collects at the step at hand: processes that share a batch add up its `parameters`' gradients."""
        return self._gradients

    @property
    def ramp(self) -> tuple[dict[str, Pattern], int]:
        """What `restore` needs of a ramp of revived weights that is under way: patterns before it, steps of it done."""
        if self.revived is None or self.revived.done >= self.revived.steps:
            return {}, 0
        return self.revived.before, self.revived.done

    # -- bringing a model there --------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        """Whether a model can begin: `start` asks it too, this is for those who want to know before they write files.

        Raises
        ------
        UserError
            Naming a layer that would drop weights, a glob that matches none, or, where zeros are to become masks, a
            layer that has more or fewer of them: figures go by the sparsity that was asked for.
        """
        self._weigh(model)
        for i, phase in enumerate(self.phases):
            phase.check_layers(f"phases.{i}", self.phases[i - 1] if i else None, list(self._weights))
        method = self.phases[0].init_method
        if sparse_layers(model):
            if method not in ("random", "from_zeros"):  # said, not refused: a file goes on with what it began
                warn_once(f"phases.0.init_method = {method} does nothing: the model is sparse, and its masks stay.")
            return
        if self.phases[0].init_file:
            MaskFile(self.phases[0].init_file).check_sparsities(self.phases[0].of_layers(self._weights))
        if method != "from_zeros":
            return
        for name, amount in self.phases[0].of_layers(self._weights).items():
            zeros = float((model.get_submodule(name).weight == 0).float().mean())  # type: ignore[union-attr]
            if amount and abs(zeros - amount) > 0.005:
                raise UserError(
                    f"phases.0.init_method = from_zeros takes zeros for masked: '{name}' has {zeros:.2%} of them, "
                    f"its sparsity is to be {amount:.2%}. Start from a model that has (init_from), or give what it has."
                )

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
        """Brings a model into the form of the first phase, before its optimizer is made or with it.

        A model that is sparse already keeps its positions, and gets more where the phase asks for more.

        Raises
        ------
        UserError
            If that would drop weights.
        """
        check_optimizer(optimizer)
        self.check(model)
        phase, before = self.phases[0], {}
        layers = sparse_layers(model)
        amounts = phase.of_layers(self._weights, self.stages[0].sparsity)
        if layers and phase.algorithm != "static":
            before = move(model, optimizer, phase, amounts, 0, (self.seed, 0), None, self.options)
        elif layers:
            for name, amount in amounts.items():
                only_added(
                    name in layers or not amount,
                    f"phase '{phase.name}': layer '{name}' is dense already and would go to {amount:.4g}",
                )
            before = grow(model, optimizer, phase, self.stages[0], self.seed)
        elif any(amounts.values()):
            amounts, file = {**phase.layers, "*": self.stages[0].sparsity}, phase.init_file
            sparsify(
                model, {glob: (file if amount and file else amount) for glob, amount in amounts.items()},
                seed=self.seed, init_method="random" if file else phase.init_method,
                truncate=phase.count == "truncate", optimizer=optimizer, **self.options,
            )  # fmt: skip
        self._forget()
        self._enter(model, 0, before)
        self._collect(1, model)
        return model

    def restore(
        self,
        model: nn.Module,
        state_dict: Mapping[str, Tensor],
        step: int,
        ramp: tuple[Mapping[str, Pattern], int] | None = None,
    ) -> nn.Module:
        """Brings a dense model into the form in which its `state_dict` was saved after `step` steps.

        Weights and optimizer state are then loaded as for any model. `ramp` is what `Phases.ramp` was when the state
        was saved.

        Raises
        ------
        UserError
            If the state does not belong to these phases at this step.
        """
        how = {option: self.options[option] for option in ("backend", "memory") if option in self.options}
        adopt(model, state_dict, **how)
        return self.resume(model, step, ramp)

    def resume(self, model: nn.Module, step: int, ramp: tuple[Mapping[str, Pattern], int] | None = None) -> nn.Module:
        """Goes on after `step` steps with a model that has the form it had then; see `restore`.

        Raises
        ------
        UserError
            If the model's form is not that of these phases at this step.
        """
        self._weigh(model)
        found, layers, weights = self._found(model)
        near = (5e-3 if self.phases[0].init_method in ("from_zeros", "file") else 1e-3) + len(layers) / max(1, weights)
        # Saved before the switch, or after it.
        index = min(
            self._time.index(max(0, step - 1)),
            self._time.index(step),
            key=lambda i: abs(self._sparsity(self.stages[i], layers) - found),
        )
        phase = self.phases[self.stages[index].phase]
        if phase.rules == "vspdf" and abs(self._sparsity(self.stages[index], layers) - found) >= near:
            raise UserError(
                f"the checkpoint has a sparsity of {found:.4g}; after {step} steps these phases have "
                f"{self._sparsity(self.stages[self._time.index(step)]):.4g}. Are the phases those it was trained with?"
            )
        self._forget(step)
        self._enter(model, index, *(ramp or ({}, 0)))
        if ramp is None and index and 0 < step - self.now.start < phase.revived_warmup:
            log.warning("resumed within a ramp of revived weights: the rest of it is left out.")
        self._collect(step + 1, model)
        return model

    def due(self, step: int) -> bool:
        """Whether `at` has something to do before a step: it changes masks, or begins to watch gradients for RigL."""
        if self._now is None or step == self._seen:
            return False
        self.require_onward(step)
        return step == self._changed or self._time.index(step) > self._now or self._due(step) or self._watches(step + 1)

    def at(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Before the step numbered `step`, from 0: switches where a boundary falls, moves masks where they are to move.

        Parameters of the model are replaced where it does, and exchanged in the `optimizer`, with their state. To be
        called before each step, or where `due` says so; a second time before the same step does nothing.

        Returns
        -------
        bool
            Whether masks have changed since the call before.

        Raises
        ------
        UserError
            Before `start` or `restore`, if steps go back, or if `optimizer` is none (several in a list).
        """
        if self._now is None:
            raise UserError("Phases: start(model) or restore(...) comes before the first step.")
        check_optimizer(optimizer)
        self._model = model = begun_with(model, self._model)
        if step == self._seen:
            return False
        self.require_onward(step)
        self._name_missed(step)
        if step != self._changed and (self._time.index(step) > self._now or self._due(step)):
            self._change(step, model, optimizer)
        if self.revived is not None:
            self.revived.follow(optimizer)
        self._collect(step + 1, model)
        self._seen = step
        return step == self._changed

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer.step()``, ramped for revived weights after a switch where `revived_warmup` asks for it.

        Where RigL is to move masks before the next step, it does so here, by the gradients of this one: a checkpoint
        that is written now holds the new masks. Those of a model that is sharded `at` moves, inside `gathered`. Calls
        that accelerate's optimizer passes over, while gradients accumulate, are no steps.
        """
        taken = take_step(optimizer) if self.revived is None else self.revived.step(optimizer)
        model, after = self._model, (self._seen or 0) + 1
        if not taken or self._gradients is None or model is None or not self._due(after):
            return
        if not any(is_sharded(parameter) for parameter in model.parameters()):
            self._change(after, model, optimizer)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """Learning rate over all steps: each phase warms up to its peak, from near zero, and decays to its end.

        Fresh weights come in at a switch: a rate that had decayed for those before is too low for them, one that went
        on at its peak would throw off the others. Hence the warm-up, over a tenth of a phase after a switch.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
            Any of torch's. Its `lr` is the peak of phases that name none; groups with an lr of their own keep its
            ratio to that.

        Returns
        -------
        torch.optim.lr_scheduler.LambdaLR
            Call its `step` after each step of the optimizer. It goes through switches by itself, and resumes by its
            `state_dict`.
        """
        check_optimizer(optimizer)
        lr = float(optimizer.defaults.get("lr", optimizer.param_groups[0]["lr"]))
        if not lr > 0:
            raise UserError(f"{type(optimizer).__name__} has lr = {lr:g}: phases need a positive one to go by.")

        def factor(step: int) -> float:
            phase, inside = self._time.place(step)
            return phase.learning_rate(inside, lr) / lr

        return LambdaLR(optimizer, factor)

    def require_onward(self, step: int) -> None:
        """Raises UserError for a step that these phases have gone past, as of a counter that begins anew each epoch."""
        reached = self._first if self._seen is None else self._seen
        require(
            step >= reached,
            f"Phases: step {step} comes after step {reached}. Steps count over the whole training, not over an epoch; "
            "before another training call start (restore or resume, a callback's prepare) again.",
        )

    # -- inside ------------------------------------------------------------------------------------------------------

    def _due(self, step: int) -> bool:
        """Whether masks are to move before a step, within its phase; by RigL, of which the gradients were seen."""
        return self._time.moves(step) and not self._watches(step)

    def _watches(self, step: int) -> bool:
        """Whether RigL moves masks before a step, and nobody looks at gradients yet."""
        return self._gradients is None and self._time.place(step)[0].algorithm == "rigl" and self._time.moves(step)

    def _name_missed(self, step: int) -> None:
        """Says so, once, where `at` was not called before a step at which masks were to move."""
        between = range(step if self._seen is None or self._missed else self._seen + 1, step)
        missed = next((s for s in between if s != self._changed and self._time.moves(s)), None)
        if missed is not None:
            self._missed = True
            log.warning("Phases.at was not called for step %d, where masks were to move: they stayed.", missed)

    def _collect(self, step: int, model: nn.Module) -> None:
        """Lets dense gradients be seen if RigL moves masks before a step, by those of the step that is at hand."""
        if self._watches(step):
            self._gradients = DenseGradients({name: model.get_submodule(name) for name in self._weights})

    def _watch_no_longer(self) -> None:
        if self._gradients is not None:
            self._gradients.close()
            self._gradients = None

    def _forget(self, first: int = 0) -> None:
        """What is known of a training before: its phases may be used again, for another model."""
        self._watch_no_longer()
        self._seen = self._changed = self.turnover = None
        self._first, self._missed = first, False

    def _change(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Gives the model the form that it is to have at a step."""
        assert self._now is not None
        old, index = self.stages[self._now], self._time.index(step)
        new, (phase, inside) = self.stages[index], self._time.place(step)
        if phase.algorithm == "static":
            before = grow(model, optimizer, phase, new, self.seed)
        else:
            amounts = phase.of_layers(self._weights, phase.target(inside))
            before = move(model, optimizer, phase, amounts, inside, (self.seed, step), self._gradients, self.options)
        self._watch_no_longer()
        if optimizer is not None and new.phase != old.phase and phase.moments == "reset":
            for parameter in model.parameters():
                forget(optimizer, parameter)
        self._enter(model, index, before)
        self._changed = step

    def _found(self, model: nn.Module) -> tuple[float, Mapping[str, SparseLinear], int]:
        """The sparsity that a model's sparse layers have together, those layers, and how many positions they have."""
        layers = sparse_layers(model)
        numel, nnz = (sum(getattr(layer.pattern, of) for layer in layers.values()) for of in ("numel", "nnz"))
        return 1 - nnz / numel if numel else 0.0, layers, numel

    def _weigh(self, model: nn.Module) -> None:
        """Notes the layers that are sparse or could be, in the model's order."""
        dense = sparsifiable(model, self.options.get("include", "*"), self.options.get("exclude", ()))
        sparse = sparse_layers(model)
        self._weights = {
            name: sparse[name].pattern.numel if name in sparse else dense[name].weight.numel()  # type: ignore[operator]
            for name, _ in model.named_modules()
            if name in sparse or name in dense
        }

    def _sparsity(self, stretch: Stretch, layers: Mapping[str, Any] | None = None) -> float:
        """That a stretch asks for over `layers`, or all of them."""
        weights = {name: n for name, n in self._weights.items() if not layers or name in layers}
        return self.phases[stretch.phase].mean(weights, stretch.sparsity)

    def _enter(self, model: nn.Module, index: int, before: Mapping[str, Pattern], done: int = 0) -> None:
        """Notes which form the model has now, and which of its weights are to ramp up."""
        self._now, self.before, self._model = index, dict(before), model
        phase = self.phases[self.now.phase]
        if self.revived is not None:
            self.revived.close()
        self.revived = (
            RevivedWarmup(model, before, phase.revived_warmup, done) if before and phase.revived_warmup else None
        )
        patterns = patterns_of(model)
        if phase.algorithm == "static" or not patterns:
            self.turnover = None
        elif self.turnover is None or not self.turnover.follows(patterns):
            self.turnover = Turnover(patterns)
        elif before:
            self.turnover.moved(patterns)
