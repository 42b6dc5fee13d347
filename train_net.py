#!/usr/bin/env python
"""Train or evaluate a model.

Train:     python train_net.py --config-file configs/focus_detr.py --num-gpus 8
Resume:    python train_net.py --config-file configs/focus_detr.py --num-gpus 8 --resume
Evaluate:  python train_net.py --config-file configs/focus_detr.py --eval-only \\
               train.init_checkpoint=output/model_final.pth
Override:  python train_net.py --config-file configs/focus_detr.py train.max_iter=100 \\
               dataloader.train.total_batch_size=2 train.device=cpu

Data sets are looked for in the folder that the environment variable DETECTRON2_DATASETS names.
"""

import argparse
import sys
from collections.abc import Sequence

from detectron2.engine import default_argument_parser, launch
from omegaconf import DictConfig
from torch.multiprocessing.spawn import ProcessExitedException

from efficient_detr.engine.checks import check_config, load_config
from efficient_detr.engine.commands import report_user_error
from efficient_detr.engine.train import run
from efficient_detr.errors import UserError

INTERRUPTED_STATUS = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: command line without the program name; None for the one of the process.

    Returns:
        The exit status: 0, 2 after an error that the user can put right, 130 after Ctrl-C.
    """
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args(argv)
    try:
        cfg = _load(args)
        launch(
            _worker,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(cfg, args),
        )
    except UserError as error:
        return report_user_error(error)
    except ProcessExitedException as error:
        # A worker process that met a UserError has reported it itself.
        return error.exit_code if isinstance(error.exit_code, int) else 1
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted: --resume goes on from the last checkpoint.\n")
        return INTERRUPTED_STATUS
    return 0


def _load(args: argparse.Namespace) -> DictConfig:
    cfg = load_config(args.config_file, args.opts)
    if args.num_gpus == 0:
        cfg.train.device = "cpu"
    check_config(cfg, eval_only=args.eval_only, num_gpus=args.num_gpus)
    return cfg


def _worker(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Run in each process; only a spawned one has to report its own errors."""
    try:
        run(cfg, args)
    except UserError as error:
        if args.num_gpus * args.num_machines <= 1:
            raise
        sys.exit(report_user_error(error))


if __name__ == "__main__":
    sys.exit(main())
