"""Mean and standard deviation of ImageNet's pixels, in RGB order, for values 0..255."""

constants = dict(
    # 255 * (0.485, 0.456, 0.406) and 255 * (0.229, 0.224, 0.225): torchvision's backbones.
    imagenet_rgb256_mean=[123.675, 116.28, 103.53],
    imagenet_rgb256_std=[58.395, 57.12, 57.375],
)
