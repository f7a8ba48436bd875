"""SparseLSHLinear: nn.Linear whose output neurons are chosen, computed and trained a few at a time."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_slide import compiled, logit_ops, losses  # noqa: F401 (logit_ops registers itself)
from torch_slide.activations import Active, SparseActivations
from torch_slide.config import ADJUSTABLE, LSHConfig
from torch_slide.logits import Source, SparseLogits
from torch_slide.sampled import Product, sampled_activations
from torch_slide.selection import make_selector, misfits
from torch_slide.targets import LabelLists

_STATE = "lsh."


def _default_config(in_features: int, out_features: int, role: str) -> LSHConfig:
    # A hidden layer has no normaliser to estimate: it wants the largest activations, not weighted samples.
    return LSHConfig.auto(in_features, out_features, selector="lsh" if role == "hidden" else None)


class SparseLSHLinear(nn.Linear):
    """An nn.Linear for very many output neurons (SLIDE, Chen et al., MLSys 2020).

    Parameters, initialisation and ``eval()`` are those of nn.Linear, bit for bit. In training, with gradients enabled,
    the layer returns :class:`SparseLogits`, and the loss computes only labels and selected neurons.

    Under torch.compile these logits break the graph once, and their loss runs eagerly; :meth:`loss` does not break it.

    Args:
        in_features: width of the input.
        out_features: number of neurons, N.
        bias: whether to learn an additive bias.
        lsh: how neurons are selected; None means ``LSHConfig.auto(in_features, out_features)``, in a hidden layer with
            ``selector="lsh"``.
        role: "output" for a layer under a loss, "hidden" for one inside a network.
        sparse_grad: give row-sparse COO gradients, as nn.Embedding(sparse=True), for ``torch_slide.optim`` and
            torch.optim.SparseAdam/SGD/Adagrad. The default gives dense gradients that any optimiser takes.
        device: of the parameters; the sparse path runs on the CPU.
        dtype: of the parameters.

    Shape:
        input [..., in_features], output [..., out_features].

    Example::

        head = ts.SparseLSHLinear(128, 200_000, sparse_grad=True)
        optimizer = ts.optim.LazyAdam(head.parameters(), lr=0.01, row_momentum=False)
        loss = torch.nn.functional.cross_entropy(head(hidden), labels)  # [512, 128], int64 [512]
        loss.backward()
        optimizer.step()
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        lsh: LSHConfig | None = None,
        role: str = "output",
        sparse_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"SparseLSHLinear: expected {name} to be at least 1, got {value}")
        if role not in ("output", "hidden"):
            raise ValueError(f"SparseLSHLinear: expected role to be 'output' or 'hidden', got {role!r}")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_up(lsh or _default_config(in_features, out_features, role), role, sparse_grad)
        self._begin()

    def reset_parameters(self) -> None:
        """As nn.Linear; the tables begin anew."""
        super().reset_parameters()
        if hasattr(self, "selector"):
            self._begin()

    def _begin(self) -> None:
        # In a hidden layer random neurons are features like any others, and tables have to find them.
        if self.role == "output" and self.weight.device.type == "cpu":
            self.selector.begin(self.weight, self.bias)

    def _set_up(self, lsh: LSHConfig, role: str, sparse_grad: bool) -> None:
        self.lsh, self.role, self.sparse_grad = lsh, role, sparse_grad
        with torch.device("cpu"):
            self.selector = make_selector(self.in_features, self.out_features, lsh)
        if role == "hidden" and self.selector.needs_labels:
            raise ValueError(
                f"SparseLSHLinear: expected role to be 'output' with selector {lsh.selector!r}, got {role!r}"
            )

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, lsh: LSHConfig | None = None, role: str = "output", sparse_grad: bool = False
    ) -> SparseLSHLinear:
        """A sparse layer that owns the very Parameters of ``linear``."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        config = lsh or _default_config(linear.in_features, linear.out_features, role)
        layer._set_up(config, role, sparse_grad)
        return layer

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        role = "" if self.role == "output" else f", role={self.role!r}"
        grad = ", sparse_grad=True" if self.sparse_grad else ""
        return f"{super().extra_repr()}{role}{grad}, selector={self.lsh.selector!r}, num_active={self.lsh.num_active}"

    def forward(self, input: Tensor) -> Tensor:
        """SparseLogits in training with gradients enabled, exact logits otherwise."""
        if not self._samples():
            return F.linear(input, self.weight, self.bias)
        return self._activate(input) if self.role == "hidden" else self._lazy(input)

    def _samples(self) -> bool:
        if not (self.training and torch.is_grad_enabled()) or self.lsh.num_active >= self.out_features:
            return False
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return False
        if self._backward_hooks or self._backward_pre_hooks:
            _warn_dense("a full backward hook on the layer needs the gradient of every logit")
            return False
        return True

    def _source(self, input: Tensor) -> Source:
        self._check_input(input)
        columns = None
        if isinstance(input, SparseActivations):
            input, columns = self._active_inputs(input)
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        return Source(
            hidden=input,
            weight=self.weight,
            bias=self.bias,
            selector=self.selector,
            draw=self.selector.draw(),
            class_dim=input.dim() - 1,
            scale=1.0,
            dtype=autocast or input.dtype,
            autocast_dtype=autocast,
            sparse_grad=self.sparse_grad,
            columns=columns,
        )

    def _active_inputs(self, input: SparseActivations) -> tuple[Tensor, Tensor | None]:
        """Values and numbers of the inputs that are not zero, where the batch shares them."""
        active = input.active
        if active.candidates.shared and self.lsh.selection == "batch":
            return active.values.reshape(*active.batch, -1), active.candidates.ids
        return active.dense(), None

    @torch.compiler.disable
    def _lazy(self, input: Tensor) -> SparseLogits:
        # Dynamo would trace into the logits as into any tensor; this makes it break the graph around them.
        if dynamo := sys.modules.get("torch._dynamo"):
            dynamo.config.nontraceable_tensor_subclasses.add(SparseLogits)
        return SparseLogits.of(self._source(input))

    @torch.compiler.disable
    def _activate(self, input: Tensor) -> SparseActivations:
        source = self._source(input)
        hidden = source.flat_hidden()
        no_labels = torch.zeros(0, dtype=torch.int64)
        offsets = torch.zeros(len(hidden) + 1, dtype=torch.int64)
        candidates = self.selector.choose(
            source.query(hidden), source.weight, source.bias, no_labels, offsets, source.draw, advance=True
        )
        values = sampled_activations(
            hidden, source.weight, source.bias, source.columns, candidates,
            Product(compute_dtype=source.autocast_dtype, sparse_grad=self.sparse_grad),
        )  # fmt: skip
        return SparseActivations.of(Active(candidates, values, input.shape[:-1], self.out_features))

    def _check_input(self, input: Tensor) -> None:
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"SparseLSHLinear: expected input to be of width {self.in_features}, got shape {tuple(input.shape)}"
            )
        if input.device.type != "cpu" or self.weight.device.type != "cpu":
            raise ValueError(
                f"SparseLSHLinear: expected input and weight to be on the CPU, got {input.device} and "
                f"{self.weight.device}; on other devices use eval() or nn.Linear (torch_slide.revert)"
            )
        if input.dtype != self.weight.dtype and not torch.is_autocast_enabled("cpu"):
            raise TypeError(f"SparseLSHLinear: expected input to be {self.weight.dtype}, got {input.dtype}")
        if self.lsh.selection == "sample" and self.weight.dtype == torch.float16:
            raise TypeError(
                "SparseLSHLinear: expected weight to be float32, float64 or bfloat16 for selection='sample', got "
                f"{self.weight.dtype}"
            )

    def loss(
        self,
        input: Tensor,
        target: Tensor | LabelLists,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy of this layer's logits for ``input``, in one call that torch.compile takes whole.

        Args:
            input: [..., in_features].
            target: as in :func:`torch_slide.cross_entropy`.
            weight: class weights [out_features].
            ignore_index: class number that marks a sample to ignore.
            reduction: "none", "mean" or "sum".
            label_smoothing: as in torch.

        Returns:
            The loss; exact in eval mode or without gradients.
        """
        if not self._samples():
            logits = F.linear(input, self.weight, self.bias).reshape(-1, self.out_features)
            if isinstance(target, Tensor) and target.layout == torch.strided:
                target = target.reshape(-1, *target.shape[input.dim() - 1 :])  # probabilities have a dimension more
            out = losses.cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing)
            return out.reshape(input.shape[:-1]) if reduction == "none" else out
        if torch.compiler.is_compiling():
            return compiled.cross_entropy(self, input, target, weight, ignore_index, reduction, label_smoothing)
        return losses.source_cross_entropy(
            self._source(input), target, weight, ignore_index, reduction, label_smoothing
        )

    def update_config(self, **changes: Any) -> None:
        """Goes on with other settings, from the next step: a larger budget, more probes, the correction switched in.

        Not part of a checkpoint: a layer that is to resume is given them again.
        :class:`torch_slide.callbacks.ConfigSchedule` does so, by the steps that the layer has made.

        Args:
            **changes: fields of :class:`LSHConfig`: ``num_active``, ``uniform_fraction``, ``strategy``, ``threshold``,
                ``refine``, ``probes``, ``correction``, ``max_active`` or ``rehash``. All others are in the tables.

        Raises:
            ValueError: for another field, or a value that the configuration does not allow; nothing is changed then.
        """
        lsh = self.check_config(**changes)
        self.selector.reconfigure(lsh)
        self.lsh = lsh

    def check_config(self, **changes: Any) -> LSHConfig:
        """The configuration that :meth:`update_config` would go on with; raises as that does."""
        if fixed := sorted(changes.keys() - set(ADJUSTABLE)):
            raise ValueError(f"update_config: expected changes of {ADJUSTABLE}, got {fixed}")
        return self.lsh.replace(**changes)

    def rehash(self) -> None:
        """Brings the tables up to date with the weights now; the schedule goes on as after a rehash of its own."""
        self.selector.rehash(self.weight, self.bias)

    def freeze_tables(self) -> None:
        """Stops scheduled rehashes; the tables, once filled, stay as they are until :meth:`unfreeze_tables`."""
        self.selector.freeze(True)

    def unfreeze_tables(self) -> None:
        """Resumes scheduled rehashes."""
        self.selector.freeze(False)

    def stats(self) -> dict[str, float]:
        """What the last selection did.

        Returns:
            active, labels, hubs, hits, uniform: neurons of the last step (means over samples with
            selection="sample"); uniform are all that were drawn and weighed, by other chances too, as
            "bucket_softmax" does; label_hit_rate: share of the labels that the tables found before they were forced
            in, always 0 with selectors that have no hits, "bucket_softmax" among them; overflow: share of table
            entries without room; rehash_share: share of the time spent rehashing.
        """
        return self.selector.stats()

    # ---- state: the selector's tensors under "lsh.", which DDP neither broadcasts nor a plain nn.Linear state needs --

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLSHLinear:
        rounds = fn(self.weight.detach().new_empty(0)).dtype != self.weight.dtype
        new = rounds and self.weight.device.type == "cpu" and self.selector.as_begun(self.weight, self.bias)
        super()._apply(fn, recurse)
        if new:
            self._begin()
        for tensor in self.selector.state.values():
            fn(tensor)  # for what it does in place (share_memory_): tables stay on the CPU, hashes in float32
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.selector.saved.items():
            destination[f"{prefix}{_STATE}{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = prefix + _STATE
        loaded = {key.removeprefix(own): value for key, value in state_dict.items() if key.startswith(own)}
        plain = {key: value for key, value in state_dict.items() if not key.startswith(own)}
        problems = self._state_problems(plain, loaded, prefix)
        if problems:
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(plain, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not loaded:
            self.selector.forget()
            return
        with torch.no_grad():
            for name, tensor in loaded.items():
                self.selector.state[name].copy_(tensor)
        self.selector.restore()

    def _state_problems(self, plain: dict[str, Any], loaded: dict[str, Any], prefix: str) -> list[str]:
        """Everything that speaks against loading, found before anything is changed."""
        own: dict[str, Tensor] = dict(self.named_parameters(recurse=False))
        found = {name: plain[prefix + name] for name in own if prefix + name in plain}
        problems = [prefix + problem for problem in misfits(own, found)]
        if loaded:
            problems += [f"{prefix}{_STATE}{problem}" for problem in self.selector.problems(loaded)]
        return problems


_warned: set[str] = set()


def _warn_dense(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"SparseLSHLinear: computing dense logits: {reason}", stacklevel=4)
