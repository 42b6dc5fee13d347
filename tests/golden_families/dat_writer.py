"""The published DAT once more, in plain loops, to write fixtures of other sizes and options.

Nothing of the package is used here: maps are (B, C, H, W), points (y, x), weights go by their
official keys and are drawn when they are first needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.golden_families.fixture import Fixture

OFFSET_KERNELS_OF_2022 = (9, 7, 5, 3)
STAGE_KEYS = (
    *("heads", "groups", "strides", "offset_range_factor", "ksizes"),
    *("use_pes", "dwc_pes", "fixed_pes", "no_offs", "log_cpb"),
)
ATTENTION_ARGUMENTS: dict[str, Any] = {
    **dict(q_size=[6, 6], kv_size=[6, 6], n_heads=4, n_head_channels=4, n_groups=2, stride=1),
    **dict(offset_range_factor=2, ksize=3, stage_idx=2, use_pe=True),
    **dict(dwc_pe=False, fixed_pe=False, log_cpb=False, no_off=False),
}
TOLERANCE = {"atol": 1e-4, "rtol": 2e-4, "note": "float32"}


def write(
    family: str,
    config: dict[str, Any],
    sizes: Sequence[tuple[int, int]],
    resized: dict[str, Any] | None = None,
) -> Fixture:
    """A fixture of a network with random weights.

    Args:
        family: "dat", "dat_detection" or "dat_pp".
        config: the published config.
        sizes: (height, width) of the images of each run.
        resized: entries of the config of the last run, whose tables are resized for it.
    """
    code = 2023 if family == "dat_pp" else 2022
    weights: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    info = {"family": family, "mode": "eval", "tolerance": TOLERANCE, "config": config}
    for run, size in enumerate(sizes, start=1):
        used = dict(weights)
        if resized is not None and run == len(sizes):
            config = config | resized
            info[f"config_r{run}"] = config
            changed = resize_tables(weights, config)
            tensors |= {f"w{run}.{key}": table for key, table in changed.items()}
            used |= changed
        network = PublishedDAT(config, code, used)
        images = torch.randn(2, 3, *size)
        network.run(images)
        tensors[f"r{run}.x"] = images
        tensors |= {f"r{run}.{name}": value for name, value in network.seen.items()}
        if run == 1:
            weights = used
    tensors |= {f"w.{key}": weight for key, weight in weights.items()}
    return Fixture(info, tensors)


def write_attention(cases: dict[str, dict[str, Any]], size: tuple[int, int]) -> Fixture:
    """A fixture of deformable attention by itself, with gradients.

    Args:
        cases: name -> "code" (2022 or 2023) and the published arguments that differ from the usual.
        size: (height, width) of the maps.
    """
    info: dict[str, Any] = {"family": "dat_attention_op", "mode": "eval", "cases": {}}
    info["tolerance"] = {"forward": TOLERANCE, "grad": {"atol": 2e-4, "rtol": 1e-3}}
    tensors: dict[str, Tensor] = {}
    for case, given in cases.items():
        args = ATTENTION_ARGUMENTS | given
        code = args.pop("code")
        stored = run_attention(args, code, size)
        tensors |= {f"{case}.{name}": tensor.detach() for name, tensor in stored.items()}
        info["cases"][case] = {"args": args, "code": str(code), "params_without_grad": []}
    return Fixture(info, tensors)


def run_attention(args: dict[str, Any], code: int, size: tuple[int, int]) -> dict[str, Tensor]:
    """Tensors of one case by their names in it."""
    stage = args["stage_idx"]
    options = {
        **dict(heads=args["n_heads"], groups=args["n_groups"], strides=args["stride"]),
        **dict(use_pes=args["use_pe"], dwc_pes=args["dwc_pe"], fixed_pes=args["fixed_pe"]),
        **dict(offset_range_factor=args["offset_range_factor"], ksizes=args["ksize"]),
        **dict(no_offs=args["no_off"], log_cpb=args["log_cpb"]),
    }
    config: dict[str, Any] = {key: [value] * 4 for key, value in options.items()}
    config["img_size"] = args["q_size"][0] * 4 * 2**stage
    network = PublishedDAT(config, code, {})
    x = torch.randn(2, args["n_heads"] * args["n_head_channels"], *size)
    network.deformed(x, stage, 0)  # draws the weights
    for leaf in (x, *network.weights.values()):
        leaf.requires_grad_()
    y = network.deformed(x, stage, 0)
    gout = torch.randn_like(y)
    y.backward(gout)
    stored = {"x": x, "y": y, "gout": gout}
    for name in ("offset_raw", "pos", "ref"):
        stored[name] = network.seen[f"stage{stage}.block0.{name}"]
    leaves = {key.split(".", 4)[-1]: weight for key, weight in network.weights.items()}
    stored |= {f"w.{key}": weight for key, weight in leaves.items()}
    for key, leaf in {"x": x, **leaves}.items():
        if leaf.grad is not None:
            stored[f"grad.{key}"] = leaf.grad
    return stored


def resize_tables(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The tables that have another size in a config, bicubically."""
    changed = {}
    for key, table in weights.items():
        stage = int(key.split(".")[1]) if key.startswith("stages.") else 0
        if key.endswith("relative_position_bias_table"):
            side, old = 2 * config["window_sizes"][stage] - 1, math.isqrt(len(table))
            square = table.reshape(old, old, -1).permute(2, 0, 1)
        elif key.endswith("rpe_table") and table.dim() == 3:
            side, square = 2 * (config["img_size"] // 4 // 2**stage) - 1, table
        else:
            continue
        if side == square.shape[-1]:
            continue
        new = F.interpolate(square[None], (side, side), mode="bicubic", align_corners=False)[0]
        flat = key.endswith("relative_position_bias_table")
        changed[key] = new.permute(1, 2, 0).flatten(0, 1) if flat else new
    return changed


class PublishedDAT:
    """A network, run once.

    Args:
        config: the published config.
        code: 2022 or 2023.
        weights: official key -> tensor; what is missing is drawn.
    """

    def __init__(self, config: dict[str, Any], code: int, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.code = code
        self.weights = weights
        self.seen: dict[str, Tensor] = {}

    def weight(self, key: str, *shape: int) -> Tensor:
        if key not in self.weights:
            noise = torch.randn(shape)
            if key.endswith("norm.weight"):
                noise = 1 + 0.1 * noise
            elif len(shape) == 1:
                noise = 0.1 * noise
            elif not key.endswith(("table", "rpb")):
                noise = noise / math.sqrt(math.prod(shape[1:]))
            self.weights[key] = noise
        return self.weights[key]

    def norm(self, x: Tensor, key: str) -> Tensor:
        channels = x.shape[1]
        scale, shift = (self.weight(f"{key}.norm.{k}", channels) for k in ("weight", "bias"))
        return F.layer_norm(x.movedim(1, -1), (channels,), scale, shift).movedim(-1, 1)

    def convolve(
        self,
        x: Tensor,
        key: str,
        out: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        depthwise: bool = False,
    ) -> Tensor:
        groups = out if depthwise else 1
        weight = self.weight(f"{key}.weight", out, x.shape[1] // groups, kernel, kernel)
        shift = self.weight(f"{key}.bias", out) if bias else None
        return F.conv2d(x, weight, shift, stride=stride, padding=padding, groups=groups)

    def linear(self, x: Tensor, key: str, out: int) -> Tensor:
        """On the last axis."""
        weight = self.weight(f"{key}.weight", out, x.shape[-1])
        return F.linear(x, weight, self.weight(f"{key}.bias", out))

    def run(self, images: Tensor) -> None:
        config = self.config
        x = self.seen["patch_proj"] = self.stem(images)
        detects = self.code == 2023
        for stage, channels in enumerate(config["dims"]):
            if stage:
                overlap = config["use_conv_patches"]
                kernel, padding = (3, 1) if overlap else (2, 0)
                key = f"down_projs.{stage - 1}"
                x = self.convolve(x, f"{key}.0", channels, kernel, 2, padding, bias=False)
                x = self.seen[f"down{stage - 1}"] = self.norm(x, f"{key}.1")
            elif x.shape[1] != channels:
                x = self.convolve(x, "stages.0.proj", channels)
            for block in range(config["depths"][stage]):
                x = self.block(x, stage, block)
            self.seen[f"stage{stage}"] = x
            if detects:
                self.seen[f"det_out{stage}"] = self.norm(x, f"norms.{stage}")
        x = self.seen["cls_norm"] = self.norm(x, "cls_norm")
        self.seen["logits"] = self.linear(x.mean((2, 3)), "cls_head", config["num_classes"])

    def stem(self, x: Tensor) -> Tensor:
        width = self.config["dim_stem"]
        if not self.config["use_conv_patches"]:
            return self.norm(self.convolve(x, "patch_proj.0", width, 4, 4), "patch_proj.1")
        if self.code == 2022:
            return self.norm(self.convolve(x, "patch_proj.0", width, 7, 4, 3), "patch_proj.1")
        x = self.norm(self.convolve(x, "patch_proj.0", width // 2, 3, 2, 1), "patch_proj.1")
        return self.norm(self.convolve(F.gelu(x), "patch_proj.3", width, 3, 2, 1), "patch_proj.4")

    def block(self, x: Tensor, stage: int, block: int) -> Tensor:
        key, config, channels = f"stages.{stage}", self.config, x.shape[1]
        if config.get("use_lpus", [False] * 4)[stage] and self.code == 2023:
            name = f"{key}.local_perception_units.{block}"
            x = x + self.convolve(x, name, channels, 3, padding=1, depthwise=True)
        attentions = {"L": self.window, "S": self.window, "N": self.nearby, "D": self.deformed}
        letter = config["stage_spec"][stage][block]
        attended = attentions[letter](self.norm(x, f"{key}.layer_norms.{2 * block}"), stage, block)
        self.seen[f"stage{stage}.block{block}.attn_out"] = attended
        x = x + self.scaled(attended, stage, 2 * block)
        hidden = self.feedforward(self.norm(x, f"{key}.layer_norms.{2 * block + 1}"), stage, block)
        return x + self.scaled(hidden, stage, 2 * block + 1)

    def scaled(self, x: Tensor, stage: int, number: int) -> Tensor:
        if self.config.get("layer_scale_values", [-1] * 4)[stage] <= 0:
            return x
        factors = self.weight(f"stages.{stage}.layer_scales.{number}.weight", x.shape[1])
        return x * factors[:, None, None]

    def feedforward(self, x: Tensor, stage: int, block: int) -> Tensor:
        key, channels = f"stages.{stage}.mlps.{block}", x.shape[1]
        width = self.config["expansion"] * channels
        if not self.config["use_dwc_mlps"][stage]:
            hidden = F.gelu(self.linear(x.movedim(1, -1), f"{key}.chunk.linear1", width))
            return self.linear(hidden, f"{key}.chunk.linear2", channels).movedim(-1, 1)
        number = ".0" if self.code == 2023 else ""
        hidden = self.convolve(x, f"{key}.linear1{number}", width)
        mixed = self.convolve(hidden, f"{key}.dwc", width, 3, padding=1, depthwise=True)
        hidden = hidden + mixed if self.code == 2023 else mixed
        return self.convolve(F.gelu(hidden), f"{key}.linear2{number}", channels)

    def window(self, x: Tensor, stage: int, block: int) -> Tensor:
        """L and S, window by window."""
        size, heads = self.config["window_sizes"][stage], self.config["heads"][stage]
        shifted = self.config["stage_spec"][stage][block] == "S"
        shift = math.ceil(size / 2) if shifted else 0
        key, channels = f"stages.{stage}.attns.{block}", x.shape[1]
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % size, 0, -height % size)).roll((-shift, -shift), (2, 3))
        labels = [torch.zeros(side) for side in x.shape[2:]]
        for label in labels if shifted else ():
            label[-size:], label[-shift:] = 1, 2
        table = self.weight(f"{key}.relative_position_bias_table", (2 * size - 1) ** 2, heads)
        cells = list(itertools.product(range(size), repeat=2))
        bias = torch.stack(
            [
                table[(qy - ky + size - 1) * (2 * size - 1) + qx - kx + size - 1]
                for (qy, qx), (ky, kx) in itertools.product(cells, repeat=2)
            ]
        )
        bias = bias.reshape(len(cells), len(cells), heads).permute(2, 0, 1)
        out = torch.empty_like(x)
        for top, left in itertools.product(*(range(0, side, size) for side in x.shape[2:])):
            area = (..., slice(top, top + size), slice(left, left + size))
            label = 3 * labels[0][area[1], None] + labels[1][None, area[2]]
            mask = -100.0 * (label.flatten()[:, None] != label.flatten())
            tokens = x[area].flatten(2).transpose(1, 2)
            parts = self.linear(tokens, f"{key}.proj_qkv", 3 * channels)
            q, k, v = parts.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            logits = q @ k.mT / math.sqrt(q.shape[-1]) + bias + mask
            done = self.linear(
                (logits.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{key}.proj_out", channels
            )
            out[area] = done.transpose(1, 2).unflatten(2, (size, size))
        return out.roll((shift, shift), (2, 3))[:, :, :height, :width]

    def nearby(self, x: Tensor, stage: int, block: int) -> Tensor:
        """N, cell by cell."""
        size, heads = self.config["nat_ksizes"][stage], self.config["heads"][stage]
        key, channels, (height, width) = f"stages.{stage}.attns.{block}", x.shape[1], x.shape[2:]
        x = F.pad(x, (0, max(size - width, 0), 0, max(size - height, 0)))
        parts = self.linear(x.permute(0, 2, 3, 1), f"{key}.qkv", 3 * channels)
        q, k, v = parts.unflatten(-1, (3, heads, -1)).permute(3, 0, 4, 1, 2, 5)
        table = self.weight(f"{key}.rpb", heads, 2 * size - 1, 2 * size - 1)
        out = torch.empty_like(q)
        for row, column in itertools.product(*(range(side) for side in x.shape[2:])):
            top, left = (
                min(max(place - size // 2, 0), side - size)
                for place, side in zip((row, column), x.shape[2:], strict=True)
            )
            rows, columns = slice(top, top + size), slice(left, left + size)
            logits = (k[:, :, rows, columns] * q[:, :, row, column, None, None]).sum(-1)
            first, second = (
                slice(start - place + size - 1, start - place + 2 * size - 1)
                for start, place in ((top, row), (left, column))
            )
            logits = logits / math.sqrt(q.shape[-1]) + table[:, first, second]
            values = v[:, :, rows, columns].flatten(2, 3)
            out[:, :, row, column] = torch.einsum(
                "bhn,bhnd->bhd", logits.flatten(2).softmax(-1), values
            )
        out = self.linear(out.permute(0, 2, 3, 1, 4).flatten(3), f"{key}.proj", channels)
        return out[:, :height, :width].permute(0, 3, 1, 2)

    def deformed(self, x: Tensor, stage: int, block: int) -> Tensor:
        """D."""
        config = {key: value[stage] for key, value in self.config.items() if key in STAGE_KEYS}
        key, channels = f"stages.{stage}.attns.{block}", x.shape[1]
        heads, groups = config["heads"], config["groups"]
        q = self.convolve(x, f"{key}.proj_q", channels)
        pos = self.positions(q, stage, block, config)
        if config["no_offs"]:
            sampled = F.avg_pool2d(x, config["strides"]).flatten(2)
        else:
            grouped = x.unflatten(1, (groups, -1)).flatten(0, 1)
            found = F.grid_sample(grouped, pos.flip(-1), align_corners=True)
            sampled = found.unflatten(0, (-1, groups)).flatten(1, 2).flatten(2)
        k, v = (
            self.convolve(sampled[..., None], f"{key}.proj_{name}", channels)[..., 0]
            for name in "kv"
        )
        q_heads, k, v = (part.unflatten(1, (heads, -1)) for part in (q.flatten(2), k, v))
        logits = torch.einsum("bhcq,bhck->bhqk", q_heads, k) / math.sqrt(channels // heads)
        extra: Tensor | float = 0.0
        if config["use_pes"] and config["dwc_pes"]:
            extra = self.convolve(q, f"{key}.rpe_table", channels, 3, padding=1, depthwise=True)
        elif config["use_pes"] and not config["no_offs"]:
            logits = logits + self.bias(x.shape[2:], pos, stage, key, config)
        out = torch.einsum("bhqk,bhck->bhcq", logits.softmax(-1), v).flatten(1, 2)
        return self.convolve(out.reshape(q.shape) + extra, f"{key}.proj_out", channels)

    def positions(self, q: Tensor, stage: int, block: int, config: dict[str, Any]) -> Tensor:
        """(B * G, Hk, Wk, 2) points (y, x); the network runs even if nobody wants its offsets."""
        key, groups, stride = f"stages.{stage}.attns.{block}", config["groups"], config["strides"]
        old = self.code == 2022
        kernel = OFFSET_KERNELS_OF_2022[stage] if old else config["ksizes"]
        padding = 0 if kernel == stride and not old else kernel // 2
        grouped = q.unflatten(1, (groups, -1)).flatten(0, 1)
        hidden = self.convolve(
            grouped,
            f"{key}.conv_offset.0",
            grouped.shape[1],
            kernel,
            stride,
            padding,
            depthwise=True,
        )
        hidden = F.gelu(self.norm(hidden, f"{key}.conv_offset.1"))
        raw = self.convolve(hidden, f"{key}.conv_offset.3", 2, bias=False)
        sides = torch.tensor(raw.shape[2:]) - (0 if old else 1)
        axes = [
            2 * (torch.arange(n) + 0.5) / side - 1
            for n, side in zip(raw.shape[2:], sides, strict=True)
        ]
        ref = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        offset, factor = raw.permute(0, 2, 3, 1), config["offset_range_factor"]
        if config["no_offs"]:
            offset = torch.zeros_like(offset)
        if factor > 0 or (factor == 0 and not old):
            offset = offset.tanh() * factor / sides
        pos = offset + ref
        if factor < 0:
            pos = pos.tanh() if old else pos.clamp(-1, 1)
        name = f"stage{stage}.block{block}"
        self.seen[f"{name}.offset_raw"] = raw
        self.seen[f"{name}.pos"] = pos.unflatten(0, (-1, groups))
        self.seen[f"{name}.ref"] = ref.expand_as(pos).unflatten(0, (-1, groups))
        return pos

    def bias(
        self, size: Sequence[int], pos: Tensor, stage: int, key: str, config: dict[str, Any]
    ) -> Tensor:
        """(B, H, queries, keys) of a table or a network."""
        heads, groups = config["heads"], config["groups"]
        side = self.config["img_size"] // 4 // 2**stage
        if config["fixed_pes"]:
            shape = (side**2, (side // config["strides"]) ** 2)
            return self.weight(f"{key}.rpe_table", heads, *shape)
        axes = [
            2 * (torch.arange(n) + 0.5) / n - 1
            if self.code == 2022
            else 2 * torch.arange(n) / (n - 1) - 1
            for n in size
        ]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        moved = grid[:, None] - pos.flatten(1, 2)[:, None]
        if config["log_cpb"]:
            moved = (4 * moved).sign() * ((4 * moved).abs() + 1).log2() / 3
            hidden = self.linear(moved, f"{key}.rpe_table.0", 32).relu()
            last = self.weight(f"{key}.rpe_table.2.weight", heads // groups, 32)
            found = F.linear(hidden, last).movedim(-1, 1)
        else:
            table = self.weight(f"{key}.rpe_table", heads, 2 * side - 1, 2 * side - 1)
            tables = table.unflatten(0, (groups, -1)).repeat(len(pos) // groups, 1, 1, 1)
            found = F.grid_sample(tables, moved.flip(-1) / 2, align_corners=True)
        return found.unflatten(0, (-1, groups)).flatten(1, 2)
