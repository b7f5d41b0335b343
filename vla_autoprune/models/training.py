"""Training of the small driving VLA: tower, then front camera, then all six, with pruning inside the decoder.

The curriculum, and why:

1. *tower*: the vision tower learns what each patch shows (and its [CLS] row what the image holds anywhere);
   without it, lights and pedestrians are too small to be found through the driving loss. Channels are divided
   by their variance, else rare ones are never learnt.
2. *front*: the decoder drives with the front camera only, which costs a quarter.
3. *surround*: all six cameras. In a share of the steps visual tokens are dropped inside the decoder at random
   budgets, ranked by the decoder's own noisy attention, so that what matters ends up in tokens that are
   attended to and planning survives the loss of the rest. In every step the attention of ranking layers is
   drawn softly towards patches that show road users, lights and lane markings.

Action tokens fed back are often hidden: with plain teacher forcing later tokens copy earlier ones and vision
gets hardly any gradient. Targets are spread over neighbouring bins. Every random choice is a function of
seed, stage and step, so a resumed training does what an uninterrupted one does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vla_autoprune.errors import InputError
from vla_autoprune.files import write_whole
from vla_autoprune.frame import CAMERAS
from vla_autoprune.models.driving_vla import DrivingVla, load_model, save_model
from vla_autoprune.models.held_out import HeldOut, OpenLoop, normalise, report_lines, schedule_counts
from vla_autoprune.models.packed import Prefix, Pruning, make_prefix, packed_logits, visual_features
from vla_autoprune.models.scene_store import SceneStore
from vla_autoprune.models.tokenizer import HIDDEN
from vla_autoprune.models.training_data import PATCH_CHANNELS
from vla_autoprune.progress import progress_bar
from vla_autoprune.pruning.schedule import default_pruning_points

STAGES = ("tower", "front", "surround")
FRONT = (CAMERAS.index("CAM_FRONT"),)
SURROUND = tuple(range(len(CAMERAS)))

RELEVANCE = {
    "vehicle": 1.0,
    "pedestrian": 3.0,
    "light_red": 4.0,
    "light_amber": 4.0,
    "light_green": 4.0,
    "brake_light": 2.0,
    "lane_marking": 0.3,
}
"""How strongly attention is drawn to the square root of a label's coverage."""


@dataclass(frozen=True)
class TrainingOptions:
    """What a training is a function of, its scenes and the model's size aside.

    Attributes:
        seed: of everything random.
        batch: scenes per step; a scene has six images and four queries.
        tower_scenes: scenes seen in stage 1, counted with repetition.
        front_scenes: in stage 2.
        surround_scenes: in stage 3.
        learning_rate: peak of the decoder's (and, in stage 1, of the tower's).
        tower_learning_rate: peak of the tower's in stages 2 and 3.
        weight_decay: of matrices.
        clip: of the gradient's norm.
        hide_query: share of queries whose action inputs are hidden.
        hide_token: share of the tokens hidden there.
        label_bins: width in bins of the spread of targets.
        patch_weight: of the patch labels in stages 2 and 3.
        attention_weight: of drawing attention to relevant patches.
        prune_share: of stage 3's steps with tokens dropped.
        prune_after: fraction of stage 3 before the first of them.
        prune_budgets: mean visual tokens into the layers, one drawn per step.
        prune_noise: scale of Gumbel noise on the logarithm of the ranking attention.
    """

    seed: int = 0
    batch: int = 16
    tower_scenes: int = 9_600
    front_scenes: int = 20_000
    surround_scenes: int = 26_000
    learning_rate: float = 1.3e-3
    tower_learning_rate: float = 3e-4
    weight_decay: float = 0.05
    clip: float = 1.0
    hide_query: float = 0.6
    hide_token: float = 0.7
    label_bins: float = 1.2
    patch_weight: float = 0.05
    attention_weight: float = 0.15
    prune_share: float = 0.6
    prune_after: float = 0.2
    prune_budgets: tuple[float, ...] = (0.6, 0.4, 0.25, 0.18)
    prune_noise: float = 0.5

    def steps(self, stage: str) -> int:
        """Optimiser steps of a stage."""
        scenes = {"tower": self.tower_scenes, "front": self.front_scenes, "surround": self.surround_scenes}
        return -(-scenes[stage] // self.batch)


@dataclass
class Progress:
    """Where a training stands and what was seen on the way.

    Attributes:
        stage: index into STAGES; len(STAGES) when finished.
        step: next step of that stage.
        losses: {"stage", "step", "loss", …} every few steps, means since the last.
        evaluations: {"stage", "step", "model": {…}, …} figures on held-out scenes.
        seconds: spent in each stage, evaluations aside.
    """

    stage: int = 0
    step: int = 0
    losses: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return self.stage == len(STAGES)


class PatchHeads(nn.Module):
    """Linear read-outs that teach the tower what patches and images show; dropped after training."""

    def __init__(self, width: int, channels: int = len(PATCH_CHANNELS)):
        super().__init__()
        self.patch = nn.Linear(width, channels)
        self.image = nn.Linear(width, channels)
        # From zero: rare channels weigh so much that random read-outs would begin with huge errors.
        for head in (self.patch, self.image):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def loss(self, states: Tensor, labels: Tensor, spread: Tensor) -> Tensor:
        """Squared errors over the channels' variances.

        Args:
            states: [M, 1 + patches, width] of the tower.
            labels: [M, patches, channels].
            spread: [2, channels] variances over patches, and of the images' maxima.
        """
        patch = ((self.patch(states[:, 1:]).float() - labels) ** 2 / spread[0]).mean()
        image = ((self.image(states[:, 0]).float() - labels.amax(dim=1)) ** 2 / spread[1]).mean()
        return patch + 0.3 * image


class Trainer:
    """One training in one directory: `run` until it is finished or time is up, and again to go on."""

    def __init__(
        self,
        vla: DrivingVla,
        scenes: SceneStore,
        held_out: HeldOut,
        out: Path,
        options: TrainingOptions,
        compile_layers: bool = False,
        say: Callable[[str], None] = print,
    ):
        self.vla = vla
        self.scenes = scenes
        self.held_out = held_out
        self.out = out
        self.options = options
        self.say = say
        self.device = scenes.device
        self.progress = Progress()
        vla.to(self.device)
        self.heads = PatchHeads(vla.tower_config.hidden_size).to(self.device)
        self._spread = _label_spread(scenes)
        self._targets = _soft_targets(vla, options.label_bins).to(self.device)
        self._relevance = torch.tensor(
            [RELEVANCE.get(name, 0.0) for name in PATCH_CHANNELS], device=self.device
        )
        self._hidden_token = vla.prompt.token_of(HIDDEN)
        self._optimizer: torch.optim.AdamW | None = None
        self._epoch: tuple[tuple[int, int], NDArray[np.int64]] | None = None
        if compile_layers:
            for module in vla.model.modules():
                if isinstance(module, GradientCheckpointingLayer):  # the layers of tower and decoder
                    module.compile()

    @property
    def checkpoint(self) -> Path:
        """Everything a resumed training needs."""
        return self.out / "checkpoint.pt"

    def resume(self) -> bool:
        """Go on from the directory's checkpoint, if there is one.

        Returns:
            Whether there was.

        Raises:
            InputError: the checkpoint is of another training, or cannot be read.
        """
        if not self.checkpoint.exists():
            return False
        try:
            saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        except Exception as error:  # torch raises several kinds
            raise InputError(
                f"{self.checkpoint} cannot be read ({error}); delete it to start anew"
            ) from error
        ours = self._identity()
        different = [name for name, value in ours.items() if saved["identity"].get(name) != value]
        if different:
            name = different[0]
            raise InputError(
                f"{self.checkpoint} is of a training with {name} = {saved['identity'].get(name)}, now it is "
                f"{ours[name]}; use the same options, another --out, or delete it"
            )
        self.vla.model.load_state_dict(saved["model"])
        self.heads.load_state_dict(saved["heads"])
        self.progress = Progress(**saved["progress"])
        if saved["optimizer"] is not None and not self.progress.finished:
            self._optimizer = self._make_optimizer(STAGES[self.progress.stage])
            self._optimizer.load_state_dict(saved["optimizer"])
        return True

    def run(self, max_minutes: float | None = None, evaluations: int = 5, save_minutes: float = 3.0) -> bool:
        """Train until finished or out of time; a checkpoint is left in either case.

        Args:
            max_minutes: after this time, counted from here with evaluations included, no further step begins;
                None goes to the end.
            evaluations: on held-out scenes, per stage that drives.
            save_minutes: between checkpoints.

        Returns:
            Whether the training is finished.
        """
        deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            while not self.progress.finished:
                if not self._run_stage(STAGES[self.progress.stage], deadline, evaluations, save_minutes):
                    return False
                self.progress.stage += 1
                self.progress.step = 0
                self._optimizer = None
        finally:
            self._save()
        return True

    def finish(self, rank_tests: bool = True) -> dict[str, Any]:
        """Write the model in half precision, judge what was written, write figures and curves.

        Args:
            rank_tests: compare attention with random ranking as well.

        Returns:
            The figures, as in `training.json`.
        """
        save_model(self.vla, self.out / "model")
        shipped = load_model(self.out / "model")
        shipped.to(self.device)
        figures = self.held_out.compare(shipped)
        self._say_figures("held out", figures)
        report: dict[str, Any] = {
            "options": dataclasses.asdict(self.options),
            "scenes": len(self.scenes),
            "device": _device_name(self.device),
            "seconds": self.progress.seconds,
            "parameters": sum(parameter.numel() for parameter in self.vla.model.parameters()),
            "held_out_scenes": min(self.held_out.scenes, len(self.held_out.store)),
            "held_out": {name: drive.summary() for name, drive in figures.items()},
            "held_out_by_kind_l2_3s_m": self._by_kind(figures["model"]),
            "rank_tests": [],
            "losses": self.progress.losses,
            "evaluations": self.progress.evaluations,
        }
        if rank_tests:
            for test in self.held_out.rank_tests(shipped):
                report["rank_tests"].append(dataclasses.asdict(test))
                low, high = test.gain_interval_m
                self.say(
                    f"after layers {test.points}, {test.budget:.0%} of the tokens ({test.reduction}): L2@3s "
                    f"{test.attention_m:.2f} m by attention, {test.random_m:.2f} random, "
                    f"{test.full_m:.2f} full; gain {test.gain_m:.2f} [{low:.2f}, {high:.2f}], "
                    f"p = {test.p_value:.4f}"
                )
        write_whole(self.out / "training.json", (json.dumps(report, indent=1) + "\n").encode())
        curves = self.out / "curves.png"
        if importlib.util.find_spec("matplotlib") is None:
            self.say(f"{curves} is not drawn: that needs pip install 'vla_autoprune[export]'")
        else:
            _draw_curves(self.progress, curves)
            self.say(f"curves in {curves}")
        return report

    def _run_stage(self, stage: str, deadline: float | None, evaluations: int, save_minutes: float) -> bool:
        options, state = self.options, self.progress
        steps = options.steps(stage)
        evaluate_every = (
            max(1, math.ceil(steps / evaluations)) if evaluations and stage != "tower" else steps + 1
        )
        log_every = max(1, steps // 100)
        if self._optimizer is None:
            self._optimizer = self._make_optimizer(stage)
        self.vla.model.train()
        pending: list[dict[str, Tensor]] = []
        last_save = time.monotonic()
        with progress_bar() as bar:
            task = bar.add_task(
                f"training, {stage}", total=steps * options.batch, completed=state.step * options.batch
            )
            while state.step < steps:
                started = time.monotonic()
                pending.append(self._step(stage, steps))
                state.step += 1
                if state.step % log_every == 0 or state.step == steps:
                    # Reading losses waits for the device: only now and then.
                    sums = _means(pending)
                    pending.clear()
                    state.losses.append({"stage": stage, "step": state.step, **sums})
                    bar.update(task, description=f"training, {stage}, loss {sums['loss']:.3f}")
                state.seconds[stage] += time.monotonic() - started
                bar.update(task, completed=state.step * options.batch)
                if state.step % evaluate_every == 0 and state.step < steps:
                    self._evaluate(stage)
                if deadline is not None and time.monotonic() > deadline:
                    return False
                if time.monotonic() - last_save > 60 * save_minutes:
                    self._save()
                    last_save = time.monotonic()
        rate = steps * options.batch / max(state.seconds[stage], 1e-9)
        self.say(f"{stage}: {steps} steps, {rate:.1f} scenes/s, {state.seconds[stage] / 60:.1f} min")
        if stage != "tower" and evaluations and steps:
            self._evaluate(stage)
        return True

    def _step(self, stage: str, steps: int) -> dict[str, Tensor]:
        options, step = self.options, self.progress.step
        stage_index = STAGES.index(stage)
        random = np.random.default_rng([options.seed, stage_index, step])
        generator = torch.Generator(self.device).manual_seed(int(random.integers(2**62)))
        rows = self._rows(stage_index, step)
        assert self._optimizer is not None
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * _warmup_cosine(step, steps)
        with self._precision():
            if stage == "tower":
                parts = self._tower_loss(rows, generator)
            else:
                parts = self._driving_loss(stage, rows, random, generator, step / steps)
        parts["loss"].backward()
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, options.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {name: value.detach() for name, value in parts.items()}

    def _tower_loss(self, rows: NDArray[np.int64], generator: torch.Generator) -> dict[str, Tensor]:
        pixels = self._pixels(rows, SURROUND, generator)
        states, _ = visual_features(self.vla.model, pixels)
        labels = self.scenes.labels[rows].flatten(0, 1).float()
        return {"loss": self.heads.loss(states, labels, self._spread)}

    def _driving_loss(
        self,
        stage: str,
        rows: NDArray[np.int64],
        random: np.random.Generator,
        generator: torch.Generator,
        done: float,
    ) -> dict[str, Tensor]:
        options, model = self.options, self.vla.model
        prefix: Prefix = make_prefix(self.vla.prompt, FRONT if stage == "front" else SURROUND)
        states, features = visual_features(model, self._pixels(rows, prefix.cameras, generator))
        labels = self.scenes.labels[rows][:, list(prefix.cameras)].float()
        features = features.float().unflatten(0, (len(rows), len(prefix.cameras))).flatten(1, 2)
        answers = self.scenes.action_ids[rows]
        points = default_pruning_points(self.vla.decoder_config.num_hidden_layers)
        pruning = None
        if stage == "surround" and done >= options.prune_after and random.random() < options.prune_share:
            pruning = self._draw_pruning(points, random)
        logits, attention = packed_logits(
            model,
            prefix,
            features,
            self.scenes.suffix_ids[rows],
            self._hide(answers[..., :-1], generator),
            pruning=pruning,
            collect=points if pruning is None else points[:1],
            generator=generator,
        )
        # What is said about the actions alone; every other loss only helps it.
        drive = -(self._targets[answers] * logits.float().log_softmax(-1)).sum(-1).mean()
        patches = self.heads.loss(states, labels.flatten(0, 1), self._spread)
        drawn = self._attention_loss(attention, labels.flatten(1, 2))
        loss = drive + options.patch_weight * patches + options.attention_weight * drawn
        named = "drive_pruned" if pruning else "drive"
        return {"loss": loss, named: drive, "patches": patches, "attention": drawn}

    def _draw_pruning(self, points: tuple[int, ...], random: np.random.Generator) -> Pruning:
        budget = float(random.choice(self.options.prune_budgets))
        slope = float(random.uniform(0.0, 0.4))
        layers = self.vla.decoder_config.num_hidden_layers
        kept = schedule_counts(self.vla.prompt.layout.visual_tokens, layers, points, budget, slope)
        reduction = "max" if random.random() < 0.5 else "mean"
        return Pruning(points, kept, reduction=reduction, noise=self.options.prune_noise)

    def _attention_loss(self, attention: list[Tensor], labels: Tensor) -> Tensor:
        """Cross-entropy of attention [B, V], per layer, against relevance; labels [B, V, channels]."""
        near = labels[..., PATCH_CHANNELS.index("inverse_distance")].clamp(0, 2)
        relevance = (labels.clamp_min(0).sqrt() @ self._relevance) * (0.5 + near) + 0.02
        wanted = relevance / relevance.sum(dim=1, keepdim=True)
        losses = [
            -(wanted * (a / a.sum(dim=1, keepdim=True)).clamp_min(1e-9).log()).sum(dim=1) for a in attention
        ]
        return torch.stack(losses).mean()

    def _hide(self, action_ids: Tensor, generator: torch.Generator) -> Tensor:
        def chance(shape: tuple[int, ...]) -> Tensor:
            return torch.rand(shape, device=self.device, generator=generator)

        batch, queries, fed = action_ids.shape
        some = chance((batch, queries, 1)) < self.options.hide_query
        hidden = some & (chance((batch, queries, fed)) < self.options.hide_token)
        return torch.where(hidden, self._hidden_token, action_ids)

    def _pixels(
        self, rows: NDArray[np.int64], cameras: tuple[int, ...], generator: torch.Generator
    ) -> Tensor:
        """Images with their exposure, contrast and noise varied, [B * cameras, 3, S, S]."""
        images = self.scenes.images_of(rows, cameras)
        pixels = normalise(images.flatten(0, 1), self.vla)

        def vary(scale: float) -> Tensor:
            drawn = torch.rand((len(pixels), 1, 1, 1), device=self.device, generator=generator)
            return scale * (2 * drawn - 1)

        noise = torch.randn(pixels.shape, device=self.device, generator=generator)
        return pixels * (1 + vary(0.2)) + vary(0.25) + 0.06 * noise

    def _rows(self, stage_index: int, step: int) -> NDArray[np.int64]:
        """The scenes of a step: every epoch goes through all of them in a new order."""
        per_epoch = max(1, len(self.scenes) // self.options.batch)
        epoch, place = divmod(step, per_epoch)
        if self._epoch is None or self._epoch[0] != (stage_index, epoch):
            random = np.random.default_rng([self.options.seed, 100 + stage_index, epoch])
            self._epoch = ((stage_index, epoch), random.permutation(len(self.scenes)))
        start = place * self.options.batch
        return self._epoch[1][start : start + self.options.batch]

    def _make_optimizer(self, stage: str) -> torch.optim.AdamW:
        options, model = self.options, self.vla.model
        tower = [*model.model.vision_tower.named_parameters(), *self.heads.named_parameters()]
        tower_rate = options.learning_rate if stage == "tower" else options.tower_learning_rate
        groups = _decayed_groups(tower, tower_rate, options.weight_decay)
        if stage != "tower":
            rest = [(n, p) for n, p in model.named_parameters() if "vision_tower" not in n]
            groups += _decayed_groups(rest, options.learning_rate, options.weight_decay)
        return torch.optim.AdamW(
            groups,
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            fused=True if self.device.type == "cuda" else None,
        )

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    def _evaluate(self, stage: str) -> None:
        cameras = FRONT if stage == "front" else SURROUND
        figures = self.held_out.compare(self.vla, cameras)
        self._say_figures(f"{stage}, step {self.progress.step}", figures)
        entry = {name: drive.summary() for name, drive in figures.items()}
        self.progress.evaluations.append({"stage": stage, "step": self.progress.step, **entry})

    def _say_figures(self, when: str, figures: dict[str, OpenLoop]) -> None:
        self.say(f"{when}:")
        for line in report_lines(figures):
            self.say(f"  {line}")

    def _by_kind(self, drive: OpenLoop) -> dict[str, float]:
        kinds = self.held_out.store.kinds[: len(drive.l2_m)]
        return {str(kind): float(drive.l2_m[kinds == kind, -1].mean()) for kind in np.unique(kinds)}

    def _identity(self) -> dict[str, Any]:
        options = json.loads(json.dumps(dataclasses.asdict(self.options)))
        text = self.vla.decoder_config
        return {
            **options,
            "scenes": len(self.scenes),
            "width": text.hidden_size,
            "layers": text.num_hidden_layers,
        }

    def _save(self) -> None:
        saved = {
            "identity": self._identity(),
            "model": self.vla.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "progress": dataclasses.asdict(self.progress),
        }
        write_whole(self.checkpoint, lambda file: torch.save(saved, file))


def _means(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: float(torch.stack([part[name] for part in parts if name in part]).mean()) for name in names}


def _label_spread(scenes: SceneStore, sample: int = 2000) -> Tensor:
    """[2, channels] variances of the labels over patches, and of the images' maxima, never quite 0."""
    labels = scenes.labels[:sample].float().flatten(0, 1)
    spread = torch.stack([labels.flatten(0, 1).var(dim=0), labels.amax(dim=1).var(dim=0)])
    return spread.clamp_min(1e-6)


def _soft_targets(vla: DrivingVla, width_bins: float) -> Tensor:
    """[vocabulary, vocabulary] the target of each action token: it and its neighbours, Gaussian in bins."""
    size = vla.decoder_config.vocab_size
    targets = torch.zeros(size, size)
    for position in (0, 1):
        tokens = vla.codec.tokens_at(position)
        bins = torch.arange(len(tokens), dtype=torch.float32)
        weights = torch.exp(-0.5 * ((bins[:, None] - bins[None, :]) / width_bins) ** 2)
        span = slice(tokens.start, tokens.stop)
        targets[span, span] = weights / weights.sum(dim=1, keepdim=True)
    return targets


def _warmup_cosine(step: int, steps: int) -> float:
    warmup = max(1, min(100, steps // 20))
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _decayed_groups(
    named: list[tuple[str, nn.Parameter]], rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    matrices = [p for name, p in named if p.ndim > 1 and "embed" not in name]
    others = [p for name, p in named if p.ndim <= 1 or "embed" in name]
    return [
        {"params": matrices, "lr": rate, "peak": rate, "weight_decay": weight_decay},
        {"params": others, "lr": rate, "peak": rate, "weight_decay": 0.0},
    ]


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )


def _draw_curves(progress: Progress, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for stage in STAGES[1:]:
        points = [entry for entry in progress.losses if entry["stage"] == stage]
        for name in ("drive", "drive_pruned"):
            xy = [(entry["step"], entry[name]) for entry in points if name in entry]
            if xy:
                left.plot(*zip(*xy, strict=True), label=f"{stage}, {name.replace('_', ' ')}", linewidth=1)
    left.set(xlabel="step", ylabel="loss of action tokens")
    if left.lines:  # none where only the tower was trained
        left.legend(fontsize=7)
    for driver in ("model", "images blanked", "constant velocity"):
        heights = [entry[driver]["l2_3s_m"] for entry in progress.evaluations]
        right.plot(range(1, len(heights) + 1), heights, marker=".", label=driver)
    right.set(xlabel="evaluation", ylabel="L2 at 3 s, m, held-out scenes", ylim=(0, None))
    right.legend(fontsize=7)
    write_whole(path, lambda file: figure.savefig(file, dpi=130, format="png"))
