"""A training run on bytes: its steps, its checkpoints, and how it stops. `train_enwik8.py` uses it.

The folder of the run is in `run_folder`, the processes that make it together in `ranks`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from segment_recurrence_pytorch.bad_steps import NOTHING_BY_ITSELF, all_finite, bad_weight, first_bad_tensor
from segment_recurrence_pytorch.checkpoint import (
    load_training_state,
    load_weights,
    save_training_state,
    save_weights,
)
from segment_recurrence_pytorch.compare import HOW, parts_of
from segment_recurrence_pytorch.console import reader_is_gone, say
from segment_recurrence_pytorch.data import Streams
from segment_recurrence_pytorch.metrics import MetricsLog
from segment_recurrence_pytorch.model import SegmentModel, plain_arguments, whole
from segment_recurrence_pytorch.random_states import random_states, set_random_states
from segment_recurrence_pytorch.ranks import Ranks
from segment_recurrence_pytorch.run_folder import (
    copy_weights,
    new_checkpoint,
    newest_usable,
    reveal,
    step_of,
    write_json,
)
from segment_recurrence_pytorch.state import State, from_list, leaves, to_list
from segment_recurrence_pytorch.training import (
    StopRequest,
    optimizer_state,
    set_optimizer_state,
    train_loss,
    warmup_cosine,
)
from segment_recurrence_pytorch.wrapper import SegmentWrapper

WEIGHT_DECAY, CLIP, BETAS = 0.01, 1.0, (0.9, 0.95)
CHECKPOINT = {'fixed', 'step', 'seconds', 'skipped', 'optimizer', 'streams', 'state', 'random'}  # what it holds
Build = Callable[[torch.device, Any], SegmentWrapper]


class Training:
    """A run while it is trained: the model, and all that a checkpoint holds.

    Args:
        build: makes the model in its wrapper, from a device and the ranks over which losses are summed.
        streams: the training bytes of all rows of the batch.
        run: the settings of the run: steps, minutes, memory ('on' or 'off'), seed, precision.
        about: what run.json holds.
        fixed: what cannot change in the run, by name.
        lr: the learning rate.
        folder: the folder of the run.
        ranks: the processes that make the run together.
        options: resume, steps, keep, parallel, compile, save_minutes and skip_bad_steps of the command line.
        going_on: returns the end of a message, which tells how to go on with the run. It takes options of the command
            line that shall be other ones then.

    Attributes:
        wrapper: the model in its wrapper.
        state: what the model carries from the last step to the next one. None at the start, and without memory.
        step: number of steps done.
        seconds: seconds of training.
        skipped: number of steps that were left out.
        saved_step: the step of the newest checkpoint.
        copied_step: the step whose weights the folder of the run has, beside the checkpoints.
    """

    def __init__(
        self,
        build: Build,
        streams: Callable[[SegmentWrapper], Streams],
        run: dict[str, Any],
        *,
        about: dict[str, Any],
        fixed: dict[str, Any],
        lr: float,
        folder: Path,
        ranks: Ranks,
        options: Any,
        going_on: Callable[..., str],
    ):
        self.build, self.run, self.about, self.fixed, self.lr = build, run, about, fixed, lr
        self.folder, self.ranks, self.options, self.going_on = folder, ranks, options, going_on
        self.memory = run['memory'] == 'on'
        self.precision = torch.autocast(ranks.device.type, torch.bfloat16, enabled=run['precision'] == 'bfloat16')
        torch.manual_seed(run['seed'])
        self.wrapper = build(ranks.device, ranks.group)
        self.model = self.wrapper.model
        self.advance = compiled_advance(self.model) if options.compile else None
        if not ranks.is_first:
            torch.manual_seed(ranks.seed(run['seed']))  # dropout differs from rank to rank, the start does not
        self.streams = streams(self.wrapper)
        self.state: State = None
        self.step, self.seconds, self.skipped, self.saved_step, self.copied_step = 0, 0.0, 0, 0, 0

    def progress(self) -> float:
        """Returns the share of the training that is done."""
        steps, minutes = self.run['steps'], self.run['minutes']
        return max(self.step / steps if steps else 0, self.seconds / (60 * minutes) if minutes else 0)

    def begin(self, place: Path) -> None:
        """Goes back to the newest checkpoint of an old run, or makes the folder of a new one.

        Args:
            place: the folder in which the run is prepared, from `run_folder.held`.
        """
        ranks, folder, saved = self.ranks, self.folder, None
        if self.options.resume:
            checkpoint, refused = ranks.on_first(lambda: newest_usable(folder, self.usable))
            for why in refused:
                say(f'refused     {why}')
            saved = ranks.together(lambda: load_checkpoint(checkpoint, self.fixed, self.model, self.streams))
            self.check_length(saved['step'], saved['seconds'])
        self.loss = ranks.parallel(self.wrapper, self.options.parallel)
        self.optimizer = torch.optim.AdamW(self.model.param_groups(self.lr, WEIGHT_DECAY), betas=BETAS)
        self.scales = [group['lr'] / self.lr for group in self.optimizer.param_groups]
        if saved is None:
            ranks.on_first(lambda: write_json(place / 'run.json', self.about | {'parts': [self.part()]}))
            ranks.on_first(lambda: write_json(place / 'config.json', plain_arguments(self.model)))
            self.save(place)
            ranks.on_first(lambda: reveal(place, folder))
            return
        set_optimizer_state(self.model, self.optimizer, saved['optimizer'])
        self.step, self.seconds, self.skipped = saved['step'], saved['seconds'], saved['skipped']
        if saved['state'][0] is not None:
            like = self.model.initial_state(1)
            self.state = ranks.own_state(self.model, [from_list(each, like) for each in saved['state']])
        set_random_states_of_rank(saved['random'], ranks, self.run['seed'] + self.step)
        self.saved_step = self.step
        ranks.on_first(lambda: copy_weights(folder, self.step))
        self.copied_step = self.step
        ranks.on_first(lambda: write_json(folder / 'run.json', self.resumed()))

    def check_length(self, made: int, seconds: float) -> None:
        """Raises ValueError if the command line asks for less training than was made already.

        Args:
            made: number of steps that were made.
            seconds: seconds of training that they took.
        """
        steps, minutes = self.options.steps, self.options.minutes
        if minutes == self.before()['run']['minutes']:  # the last step ends a little after them
            minutes = None
        if steps and made > steps:
            asked = f'--steps {steps:,}: give more, or leave it out'
            raise ValueError(f'{self.folder} is at step {made:,} already, beyond {asked}')
        if minutes and seconds > 60 * minutes:
            asked = f'--minutes {minutes:g}, which counts from the start of the run: give more, or leave it out'
            raise ValueError(f'{self.folder} was trained for {seconds / 60:.3g} minutes already, beyond {asked}')

    def before(self) -> dict[str, Any]:
        """Returns what run.json says of the run that is gone on with."""
        return json.loads((self.folder / 'run.json').read_text())

    def part(self) -> dict[str, Any]:
        """Returns how the run is trained from the present step on."""
        return {'from': self.step} | {name: self.run[name] for name in HOW}

    def resumed(self) -> dict[str, Any]:
        """Returns what run.json says from now on. How the run was trained before stands in its parts. If nothing is
        left to train, the settings of the training stay."""
        before = self.before()
        parts = parts_of(before)
        if self.progress() >= 1:
            return self.about | {'run': self.run | {name: before['run'][name] for name in HOW}, 'parts': parts}
        parts = [part for part in parts if part['from'] < self.step]  # later ones were undone
        if not parts or any(parts[-1][name] != self.run[name] for name in HOW):
            parts.append(self.part())
        return self.about | {'parts': parts}

    def usable(self, checkpoint: Path) -> Path:
        """Returns a checkpoint that can be loaded. Raises ValueError if it is not one of this run."""
        load_checkpoint(checkpoint, self.fixed, self.model, self.streams)
        return checkpoint

    def save(self, place: Path) -> None:
        """Saves a checkpoint.

        Args:
            place: the folder of the run.

        Raises:
            OSError: on all ranks, if the first one cannot write it.
        """
        ranks, step = self.ranks, self.step
        # what needs all ranks comes before the first file, since an error while writing is met by one rank alone
        plain = unsharded(self.wrapper, self.build, ranks, everywhere=False)
        parts = {
            'optimizer': optimizer_state(self.model, self.optimizer),
            'streams': self.streams.state_dict(),
            'state': [None if each is None else to_list(each) for each in ranks.states_of_all(self.state)],
            'random': ranks.gather(random_states(ranks.device)),
        }

        def write() -> None:
            assert plain is not None
            if bad := bad_weight(plain.model):
                on = self.going_on()
                raise ValueError(f'step {step:,} is not saved: the weight {bad} is not finite{on}')
            with new_checkpoint(place, step, keep=self.options.keep) as aside:
                save_weights(plain.model, aside / 'model.safetensors')
                counts = {'step': step, 'seconds': self.seconds, 'skipped': self.skipped, 'fixed': self.fixed}
                save_training_state(counts | parts, aside / 'training.pt')

        ranks.on_first(write)
        self.saved_step = step
        ranks.on_first(lambda: copy_weights(place, step))
        self.copied_step = step

    def check_saved(self) -> None:
        """Raises ValueError if the last step is not saved, or if its weights are not in the folder of the run."""
        if self.saved_step != self.step:
            on = self.going_on()
            raise ValueError(f'the end of the training is not saved, only step {self.saved_step:,}{on}')
        if self.copied_step != self.step:
            raise ValueError(
                f'{self.folder / "model.safetensors"} is that of step {self.copied_step:,} still, and the checkpoint '
                f'that of step {self.step:,}: make room on the disk{self.going_on()}'
            )

    def save_or_say(self, metrics: MetricsLog) -> None:
        """Saves a checkpoint, or says why it cannot be saved."""
        try:
            self.ranks.on_first(metrics.sync)
            self.save(self.folder)
        except OSError as error:  # the disk is full, or gone
            if self.saved_step != self.step:
                newest = f'The newest checkpoint is that of step {self.saved_step:,}'
                say(f'not saved   step {self.step:,}: {error}. {newest}')
            else:
                old = f'Its checkpoint is saved, but model.safetensors is that of step {self.copied_step:,}'
                say(f'not copied  step {self.step:,}: {error}. {old}')

    def go_on(self, log: Path) -> None:
        """Trains until the run is done. If a signal comes, it saves after the step and ends the program.

        Args:
            log: the file of the metrics.
        """
        ranks, steps, minutes = self.ranks, self.run['steps'], self.run['minutes']
        self.wrapper.train()
        unit = 'step' if steps else 's'
        total, done = (steps, self.step) if steps else (round(60 * minutes), round(self.seconds))
        hidden = None if ranks.is_first else True  # None: hidden where the output is no terminal
        last_save = time.perf_counter()
        if self.progress() >= 1:
            say('training    was done before: nothing is left of it')
        with (
            closing(MetricsLog(log if ranks.is_first else Path(os.devnull))) as metrics,
            tqdm(total=total, initial=done, unit=unit, desc='training', disable=hidden) as bar,
            StopRequest() as stop,
        ):
            (stopped,) = ranks.largest(stop_number(stop))
            while self.progress() < 1 and not stopped:
                start = time.perf_counter()
                line, shown = self.make_step()
                taken = time.perf_counter() - start
                # each rank sees signals and the clock for itself, and all have to act on them after the same step
                is_due = time.perf_counter() - last_save >= 60 * self.options.save_minutes
                stopped, self.seconds, is_due = ranks.largest(stop_number(stop), self.seconds + taken, is_due)
                metrics.write(line | {'seconds': round(self.seconds, 2)})
                if is_due and self.progress() < 1:
                    self.save_or_say(metrics)
                    last_save = time.perf_counter()
                bar.update(1 if steps else min(round(self.seconds), total) - bar.n)
                bar.set_postfix_str(f'step {self.step}, {shown}')
                if 'skipped' in line or (bar.disable and self.step & (self.step - 1) == 0):
                    say(f'step {self.step:6} {shown:>21} {self.seconds:6.0f} s')

            if self.saved_step != self.step:
                self.save_or_say(metrics)
            (stopped,) = ranks.largest(stopped or stop_number(stop))  # a signal may come while it is saved
        if stopped:
            how = f'stopped at step {self.step:,} and saved at step {self.saved_step:,}'
            say(f'{how}{self.going_on()}')
            sys.exit(128 + int(stopped))

    def make_step(self) -> tuple[dict[str, Any], str]:
        """Makes the next step.

        Returns:
            What metrics.jsonl gets, and what is shown.

        Raises:
            ValueError: if loss, gradients or state are not finite, and the step may not be left out.
        """
        ranks, model = self.ranks, self.model
        lr = self.lr * warmup_cosine(self.progress())
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group['lr'] = lr * scale
        piece = ranks.piece(next(self.streams))
        with ranks.in_context(model):
            with self.precision, reading_by(model, self.advance):
                loss, num_targets, next_state = train_loss(self.wrapper, piece, self.state, self.memory, self.loss)
            self.optimizer.zero_grad()
            loss.backward()
        gradient_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        self.step += 1
        line: dict[str, Any] = {'step': self.step}
        if not any(ranks.largest(not all_finite(loss, gradient_norm, *leaves(next_state)))):
            self.optimizer.step()
            self.state = next_state
            bits = loss.item() / math.log(2)
            line |= {'bits': bits, 'lr': lr, 'gradient_norm': gradient_norm.item(), 'bytes': int(num_targets)}
            shown = f'{bits:.3f} bits per byte'
        else:
            plain = unsharded(self.wrapper, self.build, ranks, everywhere=True)
            assert plain is not None
            with self.precision:
                bad = named(ranks.gather(first_bad_tensor(plain, piece, self.state, self.memory)))
            self.skipped += 1
            ranks.on_first(lambda: self.check_may_skip(bad, plain.model))
            self.state = None  # every row starts anew
            line |= {'skipped': bad}
            shown = f'left out, not finite: {bad}'
        if (memory_shares := getattr(model, 'memory_shares', None)) is not None:
            shares = memory_shares().tolist()
            line['memory_shares'] = [[round(share, 4) for share in layer] for layer in shares]
        return line, shown

    def check_may_skip(self, bad: str, model: SegmentModel) -> None:
        """Raises ValueError, which names the step and the tensor, unless a step with NaN may be left out.

        Args:
            bad: the first bad tensor.
            model: the model, with whole parameters. If they are not finite, leaving out a step does not help.
        """
        found = (
            f'step {self.step:,} has NaN or infinite values, first in {bad}. It was not made, and the checkpoints stay'
        )
        if bad_weight(model):
            raise ValueError(f'{found} as they are')
        if self.skipped > self.options.skip_bad_steps:
            on = self.going_on(skip_bad_steps=self.skipped)
            raise ValueError(f'{found}{on}, which leaves out such steps')


def compiled_advance(model: SegmentModel) -> Callable[..., Any]:
    """Returns `model.advance` compiled, for `reading_by`.

    Args:
        model: the model.
    """
    # one graph for each shape of what it reads: the parameter `dynamic` would make slower ones for several shapes
    return torch.compile(model.advance, fullgraph=True, dynamic=False)


@contextmanager
def reading_by(model: SegmentModel, advance: Callable[..., Any] | None) -> Iterator[None]:
    """A `with` block in which a model reads by another function than its own `advance`, unless it is None."""
    if advance is None:
        yield
        return
    model.advance = advance  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings():
            # the compiler looks at the gradients of states, which have none
            warnings.filterwarnings('ignore', 'The .grad attribute of a Tensor that is not a leaf')
            yield
    finally:
        del model.advance  # the method of the class is back: validation, samples and the search for NaN use it


def stop_number(stop: StopRequest) -> int:
    """Returns the number of the signal for which the training shall stop. 0: it shall go on."""
    return stop.signal or (signal.SIGPIPE if reader_is_gone() else 0)


def unsharded(wrapper: SegmentWrapper, build: Build, ranks: Ranks, *, everywhere: bool) -> SegmentWrapper | None:
    """Returns a wrapper whose model has whole parameters, and which makes no call to other ranks.

    If the parameters are sharded, it is a copy of the model. They are gathered one after the other, and all ranks have
    to make the call.

    Args:
        wrapper: the model in its wrapper.
        build: makes such a model.
        ranks: the processes.
        everywhere: whether each rank needs the copy, on its device. Otherwise only the first one gets it, on the CPU.
    """
    model, device = wrapper.model, ranks.device if everywhere else torch.device('cpu')
    if model.mesh is None:
        return SegmentWrapper(model, segment_length=wrapper.segment_length)
    weights = {}
    for name, tensor in model.state_dict().items():
        gathered_tensor = whole(tensor)
        if everywhere or ranks.is_first:
            weights[name] = gathered_tensor.to(device)
    if not weights:
        return None
    with torch.random.fork_rng(devices=[]):
        copy = build(device, None)
    copy.model.load_state_dict(weights)
    return copy


def load_checkpoint(checkpoint: Path, fixed: dict[str, Any], model: SegmentModel, streams: Streams) -> dict[str, Any]:
    """Goes back to the weights and the positions of a checkpoint, and returns what else it holds.

    Args:
        checkpoint: the folder of the checkpoint.
        fixed: what the run fixes.
        model: the model, which gets the weights.
        streams: the training bytes, which get their positions.

    Raises:
        ValueError: if the checkpoint is one of another run, or of another version of this program.
    """
    saved = load_training_state(checkpoint / 'training.pt')
    if missing := CHECKPOINT - set(saved):
        raise ValueError(f'{checkpoint} is of another version of this program: it has no {min(missing)!r}')
    have = saved['fixed'] | {'step': saved['step']}
    for name, value in (fixed | {'step': step_of(checkpoint)}).items():
        if have.get(name) != value:
            raise ValueError(f'{checkpoint} is of another run: its {name} is {have.get(name)}, not {value}')
    load_weights(model, checkpoint / 'model.safetensors')
    streams.load_state_dict(saved['streams'])
    return saved


def set_random_states_of_rank(states: list[dict[str, Tensor]], ranks: Ranks, seed: int) -> None:
    """Goes back to the random state of this rank.

    Args:
        states: the random states of the ranks of a checkpoint.
        ranks: the processes now. If they are not as many, only the first one goes on with the random numbers that it
            had, and the others start new ones.
        seed: seed of the new ones.
    """
    if len(states) != ranks.size:
        say(f'ranks       {ranks.size} instead of {len(states)}: dropout draws other random numbers from here on')
        torch.manual_seed(ranks.seed(seed))
    if len(states) == ranks.size or ranks.is_first:
        set_random_states(ranks.device, states[ranks.rank])


def named(found: list[str]) -> str:
    """Returns which tensor is the first bad one, if the ranks have found different ones.

    Args:
        found: what `first_bad_tensor` returned on each rank.
    """
    bad = [(rank, what) for rank, what in enumerate(found) if what != NOTHING_BY_ITSELF]
    if len(found) == 1 or not bad:
        return found[0]
    return f'what rank {bad[0][0]} reads, {bad[0][1]}'
