"""TensorFlow: our Keras layer in `tf.function` against `keras.layers.BatchNormalization`, and against itself with more
asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .cases import IMAGES, MODES, ROWS, Case, Mode, Pair, Shape, data, parameters
from .options import OPTIONS, Option

_PEER = "keras.layers in tf.function"
_LAST = {"eval": 0.72, "train": 0.32, "grad": 0.32}
_FIRST = {"eval": 1.05, "train": 0.65, "grad": 0.50}
_ROWS = {"eval": 1.02, "train": 1.02, "grad": 0.95}
_EPSILON = 1e-3  # Keras's default
# TensorFlow hands every operation to another thread until about 90 runs have told it which ones are too short for that.
_SETTLING = 100


def cases(device: str = "cpu") -> Iterator[Case]:
    """Channels last, axis 1, and rank 2; then options against our own plain call, and what has no bar."""
    for shape in IMAGES:
        for mode in MODES:
            yield _case(_PEER, mode, "NHWC", shape, _LAST[mode])
            yield _case(_PEER, mode, "NCHW", (shape[0], shape[3], shape[1], shape[2]), _FIRST[mode])
    for shape in ROWS:
        for mode in MODES:
            bar = _LAST[mode] if shape == (65536, 64) else _ROWS[mode] if shape == (256, 128) else None
            yield _case(_PEER, mode, "NC", shape, bar)
    for shape in IMAGES[:2]:
        for option in OPTIONS:
            for mode in option.modes:
                make = partial(_against_plain, mode, shape, option)
                layout = f"NHWC, {option.name}"
                yield Case("tensorflow", "ours, plain", mode, "float32", layout, shape, option.bar(mode), make)
                for what, bare in _least(option, mode):
                    peer, make = f"ours, plain (not ours: {what})", partial(_bare_ghosts, mode, shape, option, bare)
                    yield Case("tensorflow", peer, mode, "float32", layout, shape, None, make)
    for mode in MODES:
        yield _case("keras.layers with jit_compile", mode, "NHWC", IMAGES[1], None, jit_compile=True)
        yield _case("keras.layers, eager", mode, "NHWC", IMAGES[1], None, traced=False)
        yield _case(_PEER, mode, "NHWC", IMAGES[1], None, dtype="float16")
        yield _case(f"{_PEER}, mean 1e3", mode, "NHWC", IMAGES[1], None, mean=1e3)
        for shape in (*IMAGES, (65536, 64)):
            layout = "NHWC" if len(shape) == 4 else "NC"
            peer, make = f"{_PEER} (not ours: the kernel alone)", partial(_limit, mode, shape)
            yield Case("tensorflow", peer, mode, "float32", layout, shape, None, make)
    first = (8, 64, 112, 112)
    for mode in MODES[1:]:
        peer, make = f"{_PEER} (not ours: sums and one affine operation)", partial(_limit, mode, first, 1)
        yield Case("tensorflow", peer, mode, "float32", "NCHW", first, None, make)


def _case(
    peer: str, mode: Mode, layout: str, shape: Shape, bar: float | None, *, dtype: str = "float32", **options: Any
) -> Case:
    axis = 1 if layout == "NCHW" else -1
    make = partial(_against_keras, mode, shape, axis, dtype, **options)
    return Case("tensorflow", peer, mode, dtype, layout, shape, bar, make)


def _against_keras(
    mode: Mode,
    shape: Shape,
    axis: int,
    dtype: str,
    *,
    jit_compile: bool = False,
    traced: bool = True,
    mean: float = 0.5,
) -> Pair:
    import keras
    import tensorflow as tf

    import bnlayer_keras

    x, dy = (tf.constant(a) for a in data(shape, dtype, mean=mean))
    kinds = (bnlayer_keras.BatchNormalization, keras.layers.BatchNormalization)
    policy = "float32" if dtype == "float32" else f"mixed_{dtype}"
    steps: list[Callable[..., Any]] = [
        partial(_run, _layer(kind(axis=axis, dtype=policy), shape), mode) for kind in kinds
    ]
    if traced:
        steps = [_settled(tf.function(step, jit_compile=jit_compile), x, dy) for step in steps]

    def results() -> Any:
        return tuple(tuple(part.numpy() for part in step(x, dy)) for step in steps)

    tolerance = 1e-2 if dtype == "float16" or mean > 1 else 1e-4  # the peer's own
    ours, peer = (partial(_timed, step, x, dy) for step in steps)
    return Pair(ours, peer, results, tolerance, memory=partial(_memory, ours))


def _limit(mode: Mode, shape: Shape, axis: int = -1) -> Pair:
    """Not ours, but what it calls: how fast a call by this kernel, or by sums, can be."""
    import keras
    import tensorflow as tf

    x, dy = (tf.constant(a) for a in data(shape))
    bare = _Bare(shape) if axis == -1 else _BareSums(shape)
    layers = bare, _layer(keras.layers.BatchNormalization(axis=axis), shape)
    steps = [_settled(tf.function(partial(_run, layer, mode)), x, dy) for layer in layers]

    def results() -> Any:
        return tuple(tuple(part.numpy() for part in step(x, dy)) for step in steps)

    return Pair(partial(_timed, steps[0], x, dy), partial(_timed, steps[1], x, dy), results)


class _Bare:
    """TensorFlow's fused kernel and the averages, channels last: no guard, no options."""

    def __init__(self, shape: Shape, axis: int = -1) -> None:
        import tensorflow as tf

        self._flat = (-1, 1, 1, shape[-1])
        values = parameters(shape[axis])
        self.trainable_variables = [tf.Variable(values[name]) for name in ("gamma", "beta")]
        self._averages = [tf.Variable(values[name]) for name in ("moving_mean", "moving_variance")]

    def __call__(self, x: Any, *, training: bool) -> Any:
        import tensorflow as tf

        gamma, beta, *moving = map(tf.convert_to_tensor, (*self.trainable_variables, *self._averages))
        y, *batch = tf.raw_ops.FusedBatchNormV3(
            x=x if len(x.shape) == 4 else tf.reshape(x, self._flat),
            scale=gamma,
            offset=beta,
            mean=[] if training else moving[0],
            variance=[] if training else moving[1],
            epsilon=_EPSILON,
            is_training=training,
        )
        if training:
            for average, new in zip(self._averages, batch[:2], strict=True):
                average.assign(0.99 * average + 0.01 * new)
        return tf.reshape(y, tf.shape(x))


class _BareSums(_Bare):
    """The same for axis 1 in training, by E[x^2] - E[x]^2 and gradients that are written down."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, axis=1)

    def __call__(self, x: Any, *, training: bool) -> Any:
        import tensorflow as tf

        assert training
        wide, count = (1, -1, 1, 1), x.shape[0] * x.shape[2] * x.shape[3]
        ones = tf.ones((x.shape[2] * x.shape[3], 1))

        def total(values: Any) -> Any:
            return tf.reduce_sum(tf.reshape(values, (x.shape[0], x.shape[1], -1)) @ ones, (0, 2))

        @tf.custom_gradient  # type: ignore[misc]
        def normalized(x: Any, gamma: Any, beta: Any) -> Any:
            mean = total(x) / count
            variance = total(x * x) / count - mean * mean
            rstd = tf.math.rsqrt(variance + _EPSILON)
            scale = gamma * rstd
            y = x * tf.reshape(scale, wide) + tf.reshape(beta - mean * scale, wide)

            def backward(dy: Any, *_: Any) -> Any:
                dbeta = total(dy)
                dgamma = (total(dy * x) - mean * dbeta) * rstd
                slope = scale * rstd * dgamma / -count
                constant = scale * dbeta / -count - mean * slope
                dx = dy * tf.reshape(scale, wide) + (x * tf.reshape(slope, wide) + tf.reshape(constant, wide))
                return dx, dgamma, dbeta

            return (y, mean, variance), backward

        y, *batch = normalized(x, *self.trainable_variables)
        for average, new in zip(self._averages, batch, strict=True):
            average.assign(0.99 * average + 0.01 * new)
        return y


def _against_plain(mode: Mode, shape: Shape, option: Option) -> Pair:
    import tensorflow as tf

    from bnlayer_keras import BatchNormalization

    arrays, weights = data(shape), option.weights(shape, -1)
    x, dy = (tf.constant(a) for a in arrays)
    given = {} if weights is None else {str(option.kind): tf.constant(weights)}
    fields = option.fields(shape[0])
    if "renorm" in fields:  # in Keras's words
        fields = {"renorm": True, "renorm_clipping": {"rmax": 1.0, "rmin": 1.0, "dmax": 0.0}}

    def step(call: dict[str, Any], **arguments: Any) -> Any:
        layer = _layer(BatchNormalization(epsilon=_EPSILON, **arguments), shape)
        return _settled(tf.function(partial(_run, layer, mode, **call)), x, dy)

    ours, peer = step(given, **fields), step({})

    def results() -> Any:
        right = option.right(mode, arrays, parameters(shape[-1]), _EPSILON, -1)
        return tuple(part.numpy() for part in ours(x, dy)), right

    call = partial(_timed, ours, x, dy)
    return Pair(call, partial(_timed, peer, x, dy), results, memory=partial(_memory, call))


def _least(option: Option, mode: Mode) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What ghost batches take. Strided forward the fastest way has an operation that no program for XLA may have."""
    if option.groups is not None:
        yield "a kernel for each", partial(_by_kernels, option.name == "strided ghosts")
    if option.name == "strided ghosts" and mode == "train":
        yield "sums, and not for XLA", _by_sums


def _bare_ghosts(mode: Mode, shape: Shape, option: Option, bare: Callable[..., Any]) -> Pair:
    """Not ours, but the operations that are left of four ghost batches: no guard, no averages."""
    import tensorflow as tf

    from bnlayer_keras import BatchNormalization

    arrays, values = data(shape), parameters(shape[-1])
    x, dy = (tf.constant(a) for a in arrays)
    gamma, beta = (tf.Variable(values[name]) for name in ("gamma", "beta"))

    def run(x: Any, dy: Any) -> tuple[Any, ...]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = bare(x, gamma, beta)
        if mode != "grad":
            return (y,)
        dx, *_ = tape.gradient(y, [x, gamma, beta], output_gradients=dy)
        return y, dx

    ours = _settled(tf.function(run), x, dy)
    peer = _settled(tf.function(partial(_run, _layer(BatchNormalization(epsilon=_EPSILON), shape), mode)), x, dy)

    def results() -> Any:
        right = option.right(mode, arrays, values, _EPSILON, -1)
        return tuple(part.numpy() for part in ours(x, dy)), right

    return Pair(partial(_timed, ours, x, dy), partial(_timed, peer, x, dy), results)


def _by_kernels(strided: bool, x: Any, gamma: Any, beta: Any) -> Any:
    import tensorflow as tf

    axis, lengths = (1, (-1, 4, x.shape[1] * x.shape[2])) if strided else (0, (4, 1, -1))
    parts = tf.split(tf.reshape(x, (*lengths, x.shape[-1])), 4, axis)
    ys = [
        tf.raw_ops.FusedBatchNormV3(x=part, scale=gamma, offset=beta, mean=[], variance=[], epsilon=_EPSILON)[0]
        for part in parts
    ]
    return tf.reshape(tf.concat(ys, axis), x.shape)


def _by_sums(x: Any, gamma: Any, beta: Any) -> Any:
    """Strided: of each row, which is adjacent, both sums without anything in between."""
    import tensorflow as tf

    rows, *places, channels = x.shape
    values = tf.reshape(x, (rows, -1, channels))
    count = rows // 4 * places[0] * places[1]
    sums = tf.ones((rows, 1, values.shape[1])) @ values
    squares = tf.square(tf.raw_ops.EuclideanNorm(input=values, axis=[1]))
    mean, square = (tf.reduce_sum(tf.reshape(each, (-1, 4, channels)), 0) / count for each in (sums, squares))
    gain = gamma / tf.sqrt(square - tf.square(mean) + _EPSILON)
    constant = beta - mean * gain
    parts = tf.reshape(x, (-1, 4, values.shape[1], channels))
    return tf.reshape(parts * gain[:, None, :] + constant[:, None, :], x.shape)


def _layer(layer: Any, shape: Shape) -> Any:
    layer.build(shape)
    for name, value in parameters(shape[layer.axis]).items():
        getattr(layer, name).assign(value)
    return layer


def _settled(step: Callable[..., Any], x: Any, dy: Any) -> Callable[..., Any]:
    """The same, after as many steps as training has in its first minute."""
    for _ in range(_SETTLING):
        step(x, dy)
    return step


def _timed(step: Callable[..., Any], x: Any, dy: Any) -> Any:
    import tensorflow as tf

    result = step(x, dy)
    tf.test.experimental.sync_devices()
    return result


def _memory(call: Callable[[], Any]) -> int:
    """By the count of TensorFlow's own allocator, which keeps what was freed."""
    from tensorflow.config import experimental

    experimental.reset_memory_stats("CPU:0")
    before = int(experimental.get_memory_info("CPU:0")["current"])
    kept = call()
    peak = int(experimental.get_memory_info("CPU:0")["peak"])
    del kept
    return peak - before


def _run(layer: Any, mode: Mode, x: Any, dy: Any, **call: Any) -> tuple[Any, ...]:
    import tensorflow as tf

    if mode != "grad":
        return (layer(x, training=mode == "train", **call),)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True, **call)
    dx, *_ = tape.gradient(y, [x, *layer.trainable_variables], output_gradients=dy)
    return y, dx
