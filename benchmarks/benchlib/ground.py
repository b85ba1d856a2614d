"""A model and a task on which sets of adapters are tried: stock PEFT LoRA on any set, the same batches for every set.

Layers below a set's lowest adapter are frozen, and every trial with the same seed sees the same rows: what a language
model's frozen layers say of them is computed once and kept. Results are the same to rounding; only time is saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from weightlora.core.placement import PlacementCosts
from weightlora.cost import kept_bytes, placement_costs, step_cost, trace
from weightlora.runs.spec import RunSpec
from weightlora.tasks import load_model, read_task

LENGTHS_SORTED_IN = 8  # batches whose rows are sorted by length together, so that little is padding
IGNORED = -100
JUDGED = -1  # in place of a seed, of the rows that judge


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a result depends on but set, seed and rates."""

    model: str
    task: str
    steps: int
    batch: int = 16
    rank: int = 8
    alpha: int = 32
    train_rows: int = 6000
    judged_rows: int = 436
    max_length: int = 96
    words: str = ""  # that stand for the classes, each of one token, where their names are longer
    longest: int = 0  # rows of more tokens are left out, where whole texts are learned
    dtype: str = "bfloat16"  # of a language model's frozen weights, and of autocast; others compute in float32


@dataclass(frozen=True)
class Outcome:
    """``nats``: mean held-out loss; ``kept``: bytes that backward keeps of a fixed batch, dropout off."""

    nats: float
    accuracy: float
    params: int
    kept: int
    seconds: float


def _fitted(features: Tensor, classes: Tensor, decay: float) -> nn.Linear:
    """A logistic regression, by L-BFGS."""
    torch.manual_seed(0)
    layer = nn.Linear(features.shape[1], int(classes.max()) + 1)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(layer(features), classes) + decay / 2 * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return layer


@torch.no_grad()
def _nats(features: Tensor, classes: Tensor, layer: nn.Linear) -> tuple[float, float]:
    logits = layer(features)
    return float(nn.functional.cross_entropy(logits, classes)), float((logits.argmax(1) == classes).float().mean())


Observer = Callable[["Trained", int], None]


class Trained:
    """Adapters in place on the ground's model, their factors in the order of `indices`."""

    def __init__(
        self, ground: Ground, indices: Sequence[int], seed: int, ranks: int | Sequence[int] | None = None
    ) -> None:
        self.ground, self.indices = ground, list(indices)
        torch.manual_seed(seed)
        names = [ground.names[i] for i in self.indices]
        ground.model.__dict__.pop("peft_config", None)
        if names:
            usual, scale = ground.settings.rank, ground.settings.alpha // ground.settings.rank  # the scale stays
            each = [ranks or usual] * len(names) if isinstance(ranks, int | None) else list(ranks)
            config = peft.LoraConfig(
                target_modules=names,
                lora_dropout=0.0,
                rank_pattern=dict(zip(names, each, strict=True)),
                alpha_pattern={name: scale * r for name, r in zip(names, each, strict=True)},
            )
            peft.inject_adapter_in_model(config, ground.model)
        self.layers: list[Any] = [ground.model.get_submodule(name) for name in names]
        self.factors = [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in self.layers]
        for pair in self.factors:
            for p in pair:
                p.data = p.data.float()
        for parameter in ground.model.parameters():
            parameter.requires_grad_(False)
        for parameter in (*self.flat(), *ground.head()):
            parameter.requires_grad_(True)

    def flat(self) -> list[Tensor]:
        return [p for pair in self.factors for p in pair]


class Ground:
    """A loaded model and tokenized rows; every trial begins from the same weights.

    Args:
        settings: of everything.
        data_dir: of the task's rows.
        choosing: training rows alone, of which as many as usual judge, and the others are trained on.
    """

    def __init__(self, settings: Settings, data_dir: str, *, choosing: bool = False) -> None:
        torch.manual_seed(0)
        self.settings = settings
        spec = RunSpec.of(
            {
                "task": settings.task,
                "data_dir": data_dir,
                "model": settings.model,
                "max_train_samples": settings.train_rows,
            }
        )
        task = read_task(spec.task, settings.model)
        if settings.words:
            task = replace(task, words=tuple(settings.words.split()))  # type: ignore[call-arg]
        loaded = load_model(settings.model, **task.model_settings, seed=0)
        prepared = task.prepare(loaded, settings.max_length)
        self.language = task.head == "causal-lm"
        # The tokens that can answer; whole texts have none.
        self.answers = getattr(prepared.preprocess_logits, "tokens", None)
        self.dtype: torch.dtype = getattr(torch, settings.dtype) if self.language else torch.float32
        # By way of bfloat16, so that the frozen weights are the same numbers in either precision.
        self.model: Any = loaded.model.to(torch.bfloat16).to(self.dtype) if self.language else loaded.model
        self.names: list[str] = list(loaded.linear_targets)
        self.heads = list(loaded.heads)
        self.collate = prepared.collator
        self.train_rows, judged = (self._short(rows) for rows in (prepared.train, prepared.validation))
        if choosing:
            order = torch.randperm(len(self.train_rows), generator=torch.Generator().manual_seed(0)).tolist()
            judged = self.train_rows.select(order[: settings.judged_rows])
            self.train_rows = self.train_rows.select(order[settings.judged_rows :])
        step = max(1, len(judged) // settings.judged_rows)
        self.judged_rows = judged.select(range(0, len(judged), step))
        self._base = {name: self.model.get_submodule(name) for name in self.names}
        self.blocks: Any = self.model.model.layers if self.language else []
        self._seen: dict[tuple[int, int], list[Tensor]] = {}  # hidden states before every block, by key of a batch
        self.lowest = 0
        self._head = {name: p.detach().clone() for name, p in self.model.named_parameters() if self._of_head(name)}

    def _short(self, rows: Any) -> Any:
        longest = self.settings.longest
        return rows.select([i for i, ids in enumerate(rows["input_ids"]) if len(ids) <= longest]) if longest else rows

    def _of_head(self, name: str) -> bool:
        return any(name.startswith(head + ".") for head in self.heads)

    @property
    def linears(self) -> list[nn.Linear]:
        """The layers that can have an adapter, in model order."""
        return [self._base[name] for name in self.names]

    def head(self) -> list[Tensor]:
        """What trains beside the adapters."""
        return [p for name, p in self.model.named_parameters() if self._of_head(name)]

    def reset(self) -> None:
        """Take all adapters off, and give the head its first weights."""
        for name, layer in self._base.items():
            self._put(name, layer)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in self._head:
                    p.copy_(self._head[name])

    def batches(self, seed: int, count: int) -> list[dict[str, Tensor]]:
        """`count` batches of training rows in an order that the seed alone decides."""
        size, together = self.settings.batch, LENGTHS_SORTED_IN
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        found: list[list[int]] = []
        while len(found) < count:
            if len(order) < together * size:
                order += torch.randperm(len(self.train_rows), generator=generator).tolist()
            rows, order = order[: together * size], order[together * size :]
            rows.sort(key=lambda i: len(self.train_rows[i]["input_ids"]))
            pieces = torch.randperm(together, generator=generator).tolist()
            found += [rows[i * size : (i + 1) * size] for i in pieces]
        found = found[:count]
        return [
            self.collate([self.train_rows[i] for i in rows]) | self._key(seed, number)
            for number, rows in enumerate(found)
        ]

    def _key(self, seed: int, number: int) -> dict[str, tuple[int, int]]:
        return {"key": (seed, number)} if self.language else {}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch in nats, of the answer's token where words answer."""
        return self._score(batch)[0]

    def placement_costs(self) -> PlacementCosts:
        """What backward keeps for any set, of the rows that :class:`Outcome` counts it on."""
        self.reset()
        self.lowest = 0
        config = peft.LoraConfig(r=self.settings.rank, target_modules=self.names)
        wrapped = peft.get_peft_model(self.model, config)
        fixed = self._fixed()
        costs = placement_costs(trace(wrapped, lambda: self.loss(fixed), stock=True))
        self.reset()
        return costs

    def operations(self, indices: Sequence[int], ranks: int | None = None) -> int:
        """Those of one step's forward and backward pass, frozen layers with them, on the rows of placement costs."""
        self.reset()
        Trained(self, indices, seed=0, ranks=ranks)
        fixed = self._fixed()
        flops = step_cost(self.model, lambda: self.loss(fixed)).flops
        self.reset()
        return flops

    def _fixed(self) -> dict[str, Tensor]:
        """The batch that costs are counted on."""
        batch: dict[str, Tensor] = self.collate([self.train_rows[i] for i in range(self.settings.batch)])
        return batch

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _score(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The mean loss, and which rows are right."""
        with self._autocast():
            if not self.language:
                out = self.model(**batch)
                return out.loss, out.logits.argmax(-1) == batch["labels"]
            hidden = self._hidden(batch)
            where = batch["labels"][:, 1:] != IGNORED
            logits = self.model.lm_head(hidden[:, :-1][where]).float()
        right = batch["labels"][:, 1:][where]
        options = torch.arange(logits.shape[1]) if self.answers is None else torch.tensor(self.answers)
        chosen = options[logits[:, options].argmax(-1)]
        return nn.functional.cross_entropy(logits, right), chosen == right

    def _hidden(self, batch: dict[str, Any]) -> Tensor:
        """The last hidden state, from what is known of the frozen layers where the batch has a key."""
        body, mask = self.model.model, batch["attention_mask"]
        key = batch.get("key")
        if key is None:
            return body(batch["input_ids"], attention_mask=mask).last_hidden_state
        if key not in self._seen:
            self._remember(key, batch)
        try:
            body.layers = self.blocks[self.lowest :]
            return body(inputs_embeds=self._seen[key][self.lowest], attention_mask=mask).last_hidden_state
        finally:
            body.layers = self.blocks

    @torch.no_grad()
    def _remember(self, key: tuple[int, int], batch: dict[str, Any]) -> None:
        """Keep the input of every block of the model without adapters."""
        adapted = {name: self.model.get_submodule(name) for name in self.names}
        for name, layer in self._base.items():
            self._put(name, layer)
        found: list[Tensor] = []
        hooks = [block.register_forward_pre_hook(lambda _, args: found.append(args[0])) for block in self.blocks]
        self.model.model(batch["input_ids"], attention_mask=batch["attention_mask"])
        for hook in hooks:
            hook.remove()
        for name, layer in adapted.items():
            self._put(name, layer)
        # Gigabytes for each seed: those of all but the judged rows, this seed and the one before it go.
        seeds = [*dict.fromkeys(seed for seed, _ in self._seen if seed not in (JUDGED, key[0]))]
        self._seen = {of: states for of, states in self._seen.items() if of[0] not in seeds[:-1]}
        self._seen[key] = found

    def _put(self, name: str, layer: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(parent), last, layer)

    def block_modules(self) -> list[nn.Module]:
        """The transformer blocks, in order."""
        if self.language:
            return list(self.blocks)
        name = self.names[0]
        return list(self.model.get_submodule(name[: name.index(".0.")]))

    def block_of(self, index: int) -> int:
        """The block in which an adapter lies."""
        return int(next(part for part in self.names[index].split(".") if part.isdigit()))

    @torch.no_grad()
    def judge(self, size: int = 32) -> tuple[float, float]:
        """Held-out nats and accuracy of the model as it is."""
        self.model.eval()
        order = sorted(range(len(self.judged_rows)), key=lambda i: len(self.judged_rows[i]["input_ids"]))
        nats, right = 0.0, 0.0
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = self.collate([self.judged_rows[i] for i in rows]) | self._key(JUDGED, start)
            loss, found = self._score(batch)
            nats += float(loss) * len(rows)
            right += float(found.float().mean()) * len(rows)
        return nats / len(order), right / len(order)

    def readout(self, seed: int) -> Outcome:
        """A linear classifier on the frozen last hidden state, of a language model: what a head alone can do.

        It sees the rows that a trial with this seed sees; its weight decay is chosen on a third of them. Its nats are
        over the classes alone, which is easier than over all words.
        """
        assert self.answers is not None
        self.reset()
        self.lowest, began = 0, time.perf_counter()
        self.model.eval()
        size = 32
        judged = [
            self.collate([self.judged_rows[i] for i in range(at, min(at + size, len(self.judged_rows)))])
            for at in range(0, len(self.judged_rows), size)
        ]
        with torch.no_grad(), self._autocast():
            known, new = (self._features(rows) for rows in (self.batches(seed, self.settings.steps), judged))
        cut = len(known[1]) * 2 // 3
        part, rest = (known[0][:cut], known[1][:cut]), (known[0][cut:], known[1][cut:])
        decay = min((1e-3, 1e-2, 1e-1, 1.0), key=lambda decay: _nats(*rest, _fitted(*part, decay))[0])
        nats, accuracy = _nats(*new, _fitted(*known, decay))
        return Outcome(nats, accuracy, 0, 0, round(time.perf_counter() - began, 1))

    def output_layer(self, seed: int, rate: float) -> Outcome:
        """Train the output layer's weights alone on the frozen last hidden state: a head where whole texts are learned.

        The rows and the schedule are those of a trial with this seed.
        """
        self.reset()
        self.lowest, began = 0, time.perf_counter()
        self.model.eval()
        frozen, total = self.model.lm_head, self.settings.steps
        layer = nn.Linear(frozen.in_features, frozen.out_features, bias=False)
        layer.weight.data.copy_(frozen.weight)  # apart from the embedding, which stays
        optimizer = torch.optim.AdamW(layer.parameters(), lr=rate, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.06 * total), total)
        for batch in self.batches(seed, total):
            where = batch["labels"][:, 1:] != IGNORED
            with torch.no_grad(), self._autocast():
                hidden = self._hidden(batch)[:, :-1][where].float()
            nn.functional.cross_entropy(layer(hidden), batch["labels"][:, 1:][where]).backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self.model.lm_head = layer
        try:
            nats, accuracy = self.judge()
        finally:
            self.model.lm_head = frozen
        return Outcome(nats, accuracy, 0, 0, round(time.perf_counter() - began, 1))

    def _features(self, batches: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Hidden states where the answer is read, scaled to a mean square of 1, and the index of the right answer."""
        hidden, classes = [], []
        for batch in batches:
            where = batch["labels"][:, 1:] != IGNORED
            hidden.append(self._hidden(batch)[:, :-1][where].float())
            right = batch["labels"][:, 1:][where]
            classes.append((right[:, None] == torch.tensor(self.answers)).int().argmax(1))
        features = torch.cat(hidden)
        return features / features.square().mean(1, keepdim=True).sqrt(), torch.cat(classes)

    def trial(
        self,
        indices: Sequence[int],
        *,
        seed: int,
        rate: float,
        head_rate: float = 1e-3,
        observe: Observer | None = None,
        steps: int | None = None,
        judged: bool = True,
        ranks: int | Sequence[int] | None = None,
    ) -> Outcome:
        """Train LoRA on a set of adapters and judge it; AdamW, linear schedule with 6% of warm-up, clipped at 1.

        Args:
            indices: of the set; empty: the head alone, or the model as it is where it has none.
            seed: of the adapters' initial values and of the order of rows.
            rate: the adapters' learning rate.
            head_rate: that of a new head.
            observe: called after each backward pass (gradients not clipped yet) with the number of the step.
            steps: in place of the settings' number.
            ranks: in place of the settings' rank: one for all, or one for each adapter.
            judged: whether held-out rows are looked at; else the outcome has no score.
        """
        self.reset()
        self.lowest = min((self.block_of(i) for i in indices), default=len(self.blocks) - 1)
        trained, began = Trained(self, indices, seed, ranks), time.perf_counter()
        total = steps or self.settings.steps
        learns = [p for p in (*trained.flat(), *self.head())]
        fixed = self._fixed()
        self.model.eval()  # masks of dropout are left out, whatever the model did before
        kept = kept_bytes(self.model, lambda: self.loss(fixed)) if learns else 0
        if learns:
            groups = [{"params": trained.flat(), "lr": rate}, {"params": self.head(), "lr": head_rate}]
            optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
            schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.06 * total), total)
            self.model.train()
            for step, batch in enumerate(self.batches(seed, total)):
                loss = self.loss(batch)
                if not torch.isfinite(loss):
                    break
                loss.backward()
                if observe is not None:
                    observe(trained, step)
                nn.utils.clip_grad_norm_(learns, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        nats, accuracy = self.judge() if judged else (math.nan, math.nan)
        return Outcome(
            nats=nats,
            accuracy=accuracy,
            params=sum(p.numel() for p in trained.flat()),
            kept=kept,
            seconds=round(time.perf_counter() - began, 1),
        )
