""" Training of one model of a study

On a GPU the training and test steps are CUDA graphs: a small model's kernels are shorter than their launches. Whatever
changes from step to step (place in the epoch, learning rate) is therefore a tensor on the device. Each model has a
stream and a random generator of its own, so that several train at once and none depends on the others.
"""
import contextlib
import math
import time
import warnings
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from timm.data import resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from ..patch import attention_layers
from ..viz.maps import attention_statistics, common_part, row_entropy
from .augment import epoch_seed
from .data import Images, normalizer

__all__ = ['PRECISIONS', 'Recipe', 'Trainer', 'set_precision', 'train_epoch']

# TF32 in matrix products (which SOT attention must not have), TF32 in convolutions, autocast
PRECISIONS = {
    'float32': (False, False, None),
    'conv-tf32': (False, True, None),  # torch's default
    'bfloat16': (False, True, torch.bfloat16),
}


@dataclass(frozen=True)
class Recipe:
    """How every model of a study is trained, with AdamW and label smoothing."""
    epochs: int = 4
    batch_size: int = 16
    lr: float = 2e-3
    weight_decay: float = 0.03  # of all parameters
    smoothing: float = 0.1
    schedule: str = 'cosine'  # 'cosine': per step, after a short warm-up; 'original': per epoch, see `original_lr`
    augment: Tuple[str, ...] = ('crop',)
    precision: str = 'float32'

    def learning_rates(self, steps: int) -> List[float]:
        """The learning rate of every step of a run, for epochs of `steps` steps."""
        if self.schedule == 'original':
            return [original_lr(self.lr, epoch, self.epochs) for epoch in range(self.epochs) for _ in range(steps)]
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=self.lr)
        scheduler, _ = create_scheduler_v2(
            optimizer, self.schedule, num_epochs=self.epochs, warmup_epochs=0.25, warmup_lr=self.lr / 100,
            step_on_epochs=False, updates_per_epoch=steps)
        rates = []
        for step in range(self.epochs * steps):
            scheduler.step_update(step)
            rates.append(optimizer.param_groups[0]['lr'])
        return rates


def original_lr(lr: float, epoch: int, epochs: int, warmup: int = 5) -> float:
    """The rule of the original runs, a hyperbola up to `lr` and a cosine down to 0, set once an epoch."""
    if epoch < warmup:
        return lr / (warmup - epoch)
    return 0.5 * lr * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def set_precision(name: str) -> None:
    """Set, for the process, what float32 products are computed in on a GPU; cuDNN times its convolutions to choose."""
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, _ = PRECISIONS[name]
    torch.backends.cudnn.benchmark = True


class Trainer:
    """A model with all that its training changes, in tensors that stay where they are.

    A trainer is built once for a model and must be `reset` for every run of it, also the first.
    """

    def __init__(
            self,
            model: nn.Module,
            recipe: Recipe,
            train: Images,
            test: Images,
            device: torch.device,
            graphs: bool = True,
    ):
        """Initialize the trainer.

        Args:
            model: Any timm classifier.
            recipe: How to train.
            train: The epoch to train on, on `device`; the caller changes its contents from epoch to epoch.
            test: Images to test on, on `device`.
            device: Where to train.
            graphs: Capture the steps in CUDA graphs, on a GPU.
        """
        self.model = model.to(device)
        if device.type == 'cpu':  # convolutions are faster so
            self.model.to(memory_format=torch.channels_last)
        self.train, self.test = train, test
        self.device = device
        self.autocast = PRECISIONS[recipe.precision][2]
        config = resolve_model_data_config(model)
        self.normalize = normalizer(config['mean'], config['std'], device)
        self.criterion = LabelSmoothingCrossEntropy(recipe.smoothing)
        self.train_sizes = batch_sizes(len(train.labels), recipe.batch_size)
        self.test_sizes = batch_sizes(len(test.labels), recipe.batch_size)  # SOT with `tol` depends on the batch

        self.rates = torch.tensor(recipe.learning_rates(len(self.train_sizes)), device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # of the run
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)  # first image of the next batch
        self.arange = torch.arange(recipe.batch_size, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64 if device.type != 'mps' else torch.float32, device=device)
        self.optimizer = self._create_optimizer(recipe)

        self.stream = self.generator = None
        self.steps: Dict[Tuple[bool, int], Callable[[], None]] = {}
        if graphs and device.type == 'cuda':
            self._capture()

    @property
    def captured(self) -> bool:
        """Whether the steps are CUDA graphs, which run beside those of other trainers."""
        return bool(self.steps)

    def _create_optimizer(self, recipe: Recipe) -> torch.optim.Optimizer:
        """The optimizer, its state allocated and its learning rate a tensor."""
        options = {}
        if self.device.type in ('cpu', 'cuda'):
            options = dict(fused=True, **(dict(capturable=True) if self.device.type == 'cuda' else {}))
        optimizer = create_optimizer_v2(
            self.model.parameters(), opt='adamw', lr=recipe.lr, weight_decay=recipe.weight_decay, **options)
        self.lr = torch.zeros((), device=self.device)
        for group in optimizer.param_groups:
            group['lr'] = self.lr
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # at learning rate 0
        optimizer.zero_grad()
        return optimizer

    def state(self) -> Dict[str, Any]:
        """All that training changes; the tensors themselves, not copies."""
        return {
            'model': self.model.state_dict(),
            'optimizer': [self.optimizer.state[parameter] for parameter in self.model.parameters()],
            'step': self.step,
        }

    @torch.no_grad()
    def load_state(self, state: Dict[str, Any]) -> None:
        """Copy a state into the tensors of this trainer.

        Raises:
            ValueError, or another that its items raise: If it is not the state of such a model; this trainer's own is
                then partly overwritten.
        """
        own = self.state()
        pairs = [(own['model'], state['model']), *zip(own['optimizer'], state['optimizer'], strict=True)]
        for mine, given in [*pairs, ({'step': self.step}, state)]:
            for name, tensor in mine.items():
                if given[name].shape != tensor.shape:  # some of which copy_ would broadcast
                    raise ValueError(f'{name} has the shape {tuple(given[name].shape)} for {tuple(tensor.shape)}')
                tensor.copy_(given[name])

    @torch.no_grad()
    def reset(self, initial: Dict[str, torch.Tensor]) -> None:
        """Begin a run at the initial values of the model's state dict."""
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(initial[name])
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        self.step.zero_()

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """Prepare for the training steps of an epoch, the data of which are in `train`."""
        self.model.train()
        if self.captured:
            self.generator.manual_seed(epoch_seed(seed, epoch))  # dropout and stochastic depth
        else:
            torch.manual_seed(epoch_seed(seed, epoch))
        with self._on_stream():
            self.cursor.zero_()

    def train_step(self, size: int) -> None:
        """Train on the next `size` images of the epoch."""
        with self._on_stream():
            self.steps.get((True, size), lambda: self._train_step(size))()

    def evaluate(self) -> None:
        """Test the model; `result` has the outcome."""
        self.model.eval()
        with self._on_stream():
            self.cursor.zero_()
            self.correct.zero_()
            self.loss_sum.zero_()
            for size in self.test_sizes:
                self.steps.get((False, size), lambda: self._test_step(size))()

    def result(self) -> Tuple[float, float]:
        """Top-1 in percent and mean cross-entropy of the last evaluation; waits for it."""
        n = len(self.test.labels)
        with self._on_stream():
            return 100 * self.correct.item() / n, self.loss_sum.item() / n

    def attention_statistics(self, num_images: int = 512) -> Dict[str, Dict[str, List[float]]]:
        """What the model's attention weights are like: `entropy`, see `row_entropy`, and `common`, see `common_part`.

        The model runs eagerly, in evaluation mode and in float32, without random numbers, in batches of the size that
        it trained with: SOT with `tol` depends on the batch. In bfloat16 the weights would be rounded, and what queries
        of nearly uniform weights have in common would be the rounding.

        Args:
            num_images: Number of test images, spread evenly over them.

        Returns:
            For each of the two a value for each head, the mean over images and, of the entropy, queries, by the name of
            the layer's block; empty for a model without attention layers of a known class.
        """
        try:
            attention_layers(self.model)
        except ValueError:
            return {'entropy': {}, 'common': {}}
        self.model.eval()
        total = len(self.test.labels)
        count = min(num_images, total)
        sums: Dict[str, torch.Tensor] = {}  # (2, H) by layer
        with self._on_stream():
            for index in (torch.arange(count, device=self.device) * total // count).split(len(self.arange)):
                statistics = attention_statistics(
                    self.model, self.normalize(self.test.images[index]), [row_entropy, common_part])
                for name, (entropy, common) in statistics.items():  # (B, H, N), (B, H)
                    # of the batch, which some models make more of, as they fold patches into it (MobileViT)
                    mean = torch.stack([entropy.mean(dim=2), common]).mean(dim=1)
                    sums[name] = sums.get(name, 0) + mean * len(index)
            return {
                key: {name: [round(value, 9) for value in (values[i] / count).tolist()]
                      for name, values in sums.items()}
                for i, key in enumerate(('entropy', 'common'))}

    def _on_stream(self):
        return torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()

    def _autocast(self):
        return torch.autocast(self.device.type, self.autocast, cache_enabled=False) if self.autocast \
            else contextlib.nullcontext()

    def _forward(self, images: Images, size: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of the next `size` images."""
        index = self.cursor + self.arange[:size]
        self.cursor += size
        batch = self.normalize(images.images.index_select(0, index))
        with self._autocast():
            logits = self.model(batch)
        return logits.float(), images.labels.index_select(0, index)

    def _train_step(self, size: int) -> None:
        self.optimizer.zero_grad()
        self.criterion(*self._forward(self.train, size)).backward()
        self.lr.copy_(self.rates.index_select(0, self.step).squeeze(0))
        self.step += 1
        self.optimizer.step()

    @torch.no_grad()
    def _test_step(self, size: int) -> None:
        logits, labels = self._forward(self.test, size)
        self.correct += (logits.argmax(1) == labels).sum()
        self.loss_sum += nn.functional.cross_entropy(logits, labels, reduction='sum')

    def _capture(self) -> None:
        """Make CUDA graphs of the steps; where that fails, warn and leave them eager."""
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        default = torch.cuda.default_generators[index]
        original, current = default.graphsafe_get_state(), torch.cuda.current_stream()
        self.stream = torch.cuda.Stream(self.device)
        self.generator = default.clone_state()
        before = [tensor.clone() for tensor in self.model.state_dict().values()]
        try:
            default.graphsafe_set_state(self.generator)
            self.stream.wait_stream(current)
            pool = torch.cuda.graph_pool_handle()
            for training, sizes in ((True, self.train_sizes), (False, self.test_sizes)):
                self.model.train(training)
                function = self._train_step if training else self._test_step
                for size in dict.fromkeys(sizes):
                    with self._on_stream():
                        for _ in range(3):  # lets cuDNN choose and libraries allocate
                            self.cursor.zero_()
                            self.step.zero_()
                            function(size)
                        self.cursor.zero_()
                        self.step.zero_()
                        self.optimizer.zero_grad()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode='thread_local'):
                        function(size)
                    self.steps[training, size] = graph.replay
        except torch.OutOfMemoryError:  # with fewer models at once there may be room
            raise
        except Exception as e:
            warnings.warn(f'no CUDA graphs, training eagerly: {type(e).__name__}: {e}', RuntimeWarning)
            self.steps, self.stream, self.generator = {}, None, None
        finally:
            torch.cuda.set_stream(current)  # a capture that fails may leave its own
            default.graphsafe_set_state(original)
        torch.cuda.synchronize()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for tensor, value in zip(self.model.state_dict().values(), before):
                tensor.copy_(value)


def batch_sizes(n: int, batch_size: int) -> List[int]:
    """Sizes of the batches of n images, of which the last may be smaller."""
    return [min(batch_size, n - start) for start in range(0, n, batch_size)]


def train_epoch(
        trainers: Sequence[Trainer],
        seed: int,
        epoch: int,
        on_step: Callable[[int], None] = lambda index: None,
) -> List[Tuple[float, float, float]]:
    """Train the models on one epoch, whose data the caller has put in place, and test them.

    Args:
        trainers: The models; those with CUDA graphs run at once, the others one after another.
        seed: Seed of their runs.
        epoch: The epoch, from 0.
        on_step: Called with the index of a trainer after each of its steps.

    Returns:
        For each top-1 in percent, mean cross-entropy, and its share of the seconds.
    """
    together = [[i for i, trainer in enumerate(trainers) if trainer.captured]]
    alone = [[i] for i, trainer in enumerate(trainers) if not trainer.captured]
    if trainers and trainers[0].device.type == 'cuda':
        torch.cuda.synchronize()  # the data are in place
    results = [(0., 0., 0.)] * len(trainers)
    for indices in filter(None, together + alone):
        start = time.perf_counter()
        for i in indices:
            trainers[i].begin_epoch(seed, epoch)
        for size in trainers[indices[0]].train_sizes:
            for i in indices:
                trainers[i].train_step(size)
                on_step(i)
        for i in indices:
            trainers[i].evaluate()
        outcomes = [trainers[i].result() for i in indices]
        seconds = (time.perf_counter() - start) / len(indices)
        for i, outcome in zip(indices, outcomes):
            results[i] = *outcome, seconds
    return results
