"""What the tests know of timm's train.py and validate.py, which are not part of its package."""

# options that README and train_configs use; test_train_configs.py compares them with the scripts where they are present
TRAIN_OPTIONS = {
    '--aa', '--amp', '--amp-dtype', '--batch-size', '--color-jitter', '--config', '--cooldown-epochs', '--cutmix',
    '--data-dir', '--dataset', '--dataset-download', '--device', '--device-modules', '--epochs', '--experiment',
    '--img-size', '--initial-checkpoint', '--lr', '--min-lr', '--mixup', '--mixup-off-epoch', '--mixup-switch-prob',
    '--model', '--model-kwargs', '--num-classes', '--opt', '--pretrained', '--pretrained-path', '--scale', '--sched',
    '--smoothing', '--train-split', '--val-split', '--warmup-epochs', '--warmup-lr', '--weight-decay', '--workers',
}
VALIDATE_OPTIONS = {'--checkpoint', '--data-dir', '--model', '--model-kwargs', '--num-classes', '--split'}
