"""The quickstart with a tiny DAT++ instead of the narrow ResNet, from random weights on a CPU.

    python train_net.py --config-file configs/quickstart_dat.py

Everything but the backbone is as in configs/quickstart.py: neighbourhood attention and deformable
attention take turns in six blocks, on maps that are small enough for dense tables. 1,400 iterations
gave AP 0.627 and AP50 0.851 (one seed).
"""

from efficient_detr.modeling.backbones.dat_variants import StageSpecification, dat_plus_plus

from .quickstart import dataloader, lr_multiplier, model, optimizer, train

# Pictures of 96 to 112 pixels are padded to 128 at most: maps of 32, 16, 8 and 4 cells.
model.detector.backbone = dat_plus_plus(
    [
        StageSpecification("N", channels=24, num_heads=2),
        StageSpecification("ND", 48, num_heads=3, num_groups=1, key_stride=2, offset_kernel=5),
        StageSpecification("ND", 96, num_heads=6, num_groups=2, key_stride=1, offset_kernel=3),
        StageSpecification("D", 160, num_heads=8, num_groups=4, key_stride=1, offset_kernel=3),
    ],
    image_size=128,
    window=3,
    out_features=["p1", "p2", "p3"],
)
train.output_dir = "output/quickstart_dat"
