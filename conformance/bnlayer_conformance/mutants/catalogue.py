"""The mutants. Each is one line away from `base`."""

from __future__ import annotations

from typing import Final

from .build import Mutant

_MOVE_MEAN: Final = "new_mean = d * old_mean + (1 - d) * mean.reshape(-1)"
_MOVE_VARIANCE: Final = "new_variance = d * old_variance + (1 - d) * entering.reshape(-1)"
_ENTERING: Final = 'entering = unbiased if spec.moving_variance_estimator == "unbiased" else variance'
_DECAY: Final = 'd = 1 - 1 / t if spec.decay == "cumulative" else float(spec.decay)'
_VARIANCE: Final = "variance = total(p * np.square(seen - mean))"
_MEAN: Final = "mean = total(p * seen)"
_UNBIASED: Final = "unbiased = variance * 0 if single else variance / (1 - one_over_n)"
_SD: Final = "sd = np.sqrt(variance + arithmetic(spec.epsilon))"
_XHAT: Final = "xhat = (x - mean) / sd"
_GAMMA: Final = "y = y * per_channel(state.gamma)"
_BETA: Final = "y = y + per_channel(state.beta)"
_AXES: Final = "axes = tuple(i for i in range(x.ndim) if i != axis)"
_AXIS: Final = "axis = spec.axis % x.ndim"
_BATCH: Final = "batch = training or not spec.track_moving_stats"
_WEIGHTED: Final = "batch = batch and bool(W > 0)"
_SEEN: Final = "seen = np.where(w > 0, x, 0)"
_P: Final = "p = (w / W).astype(arithmetic)"
_X: Final = "x = call.x.astype(arithmetic)"
_ARITHMETIC: Final = "arithmetic = np.float64 if call.x.dtype == np.float64 else np.float32"
_MOVES: Final = "moves = training and request.update_stats and spec.track_moving_stats and len(batches) > 0"
_ENTERS: Final = "enters = Batch(mean, variance, unbiased, float(W)) if batch or not training else None"
_TRAINING: Final = "training = trains(spec, request.training, request.frozen_statistics)"
_STATE: Final = "return state.replace(**new, num_updates=t)"
_INNER: Final = "inner = g - p * (s1 + xhat * s2)"
_DX: Final = "dx[tape.rows] = gamma * r / sd * inner"
_DGAMMA: Final = "dgamma = dgamma + total(dz * z).reshape(-1)"
_DBETA: Final = "dbeta = total(dy).reshape(-1)"
_STARTED: Final = "started = -math.expm1(t * math.log(d)) if d > 0 else 1.0"
_HIDDEN_MEAN: Final = 'new["hidden_mean"] = d * old["hidden_mean"] + (1 - d) * mean.reshape(-1)'
_HIDDEN_VARIANCE: Final = 'new["hidden_variance"] = d * old["hidden_variance"] + (1 - d) * entering.reshape(-1)'
_DEN: Final = "den = np.maximum(per_channel(state.renorm_stddev), arithmetic(math.sqrt(spec.epsilon)))"
_R_MIN: Final = "r = r if clips.r_min is None else np.maximum(r, arithmetic(clips.r_min))"
_R_MAX: Final = "r = r if clips.r_max is None else np.minimum(r, arithmetic(clips.r_max))"
_D_MAX: Final = "dd = dd if clips.d_max is None else np.clip(dd, arithmetic(-clips.d_max), arithmetic(clips.d_max))"
_Z: Final = "z = tape.xhat * tape.r + tape.dd"
_FROM_STDDEV: Final = 'new_variance = np.maximum(np.square(new["moving_stddev"]) - spec.epsilon, 0)'
_SIZE: Final = "size = spec.virtual_batch_size"
_GHOST_VARIANCE: Final = "variance = sum(q * batch.variance for q, batch in zip(shares, batches, strict=True))"
_PART: Final = (
    "tape, entering = _part(state, spec, call, clips, x[rows], w[rows], axis, axes, shape, training, replicas)"
)
_MASKED_XHAT: Final = "xhat = np.where((tape.w > 0) | np.isfinite(tape.xhat), tape.xhat, 0)"
_MERGED: Final = "variance = np.sum([s * (v + b) for s, v, b in zip(shares, variances, between, strict=True)], axis=0)"
_SHARES: Final = "shares = [own / W for own in totals]"
_ONE_OVER_N: Final = "one_over_n = sum(squares) / W**2"
_ALL_REDUCED: Final = "return np.asarray(sum(sums))"
_MOVED: Final = "moved = (t - shift - xhat * q) / sd"
_OF_SD: Final = "of_sd = inner * q / sd"
_OF_XHAT: Final = "of_xhat = p * (moved * s2 + xhat * s2_moved)"
_HVP: Final = "hvp[tape.rows] = -gamma * r / sd * (of_sd + of_xhat)"
_EACH: Final = "at = xhat * s1 + 0.5 * (np.square(xhat) - ratio) * s2"

MUTANTS: Final = (
    # The moving average.
    Mutant("decay weighs the new", _MOVE_MEAN, "new_mean = (1 - d) * old_mean + d * mean.reshape(-1)",
           "huggingface/transformers#19454 and ten more"),
    Mutant("decay weighs the new variance", _MOVE_VARIANCE, "new_variance = (1 - d) * old_variance + d * entering.reshape(-1)"),
    Mutant("mean never moves", _MOVE_MEAN, "new_mean = old_mean", "tensorflow/tensorflow#11965: update ops not run"),
    Mutant("variance never moves", _MOVE_VARIANCE, "new_variance = old_variance", "keras-team/keras-core#338"),
    Mutant("variance averages deviations", _MOVE_VARIANCE,
           "new_variance = np.square(d * np.sqrt(old_variance) + (1 - d) * np.sqrt(entering.reshape(-1)))"),
    Mutant("moving variance is inverse deviation", _MOVE_VARIANCE,
           "new_variance = d * old_variance + (1 - d) / np.sqrt(entering.reshape(-1) + spec.epsilon)", "microsoft/onnxruntime#7218"),
    Mutant("moving variance includes epsilon", _MOVE_VARIANCE,
           "new_variance = d * old_variance + (1 - d) * (entering.reshape(-1) + spec.epsilon)"),
    Mutant("average as a difference", _MOVE_MEAN,
           "new_mean = (old_mean.astype(np.float32) + np.float32(1 - d) * (mean.reshape(-1) - old_mean.astype(np.float32)))"),
    Mutant("average as a difference, variance", _MOVE_VARIANCE,
           "new_variance = (old_variance + np.float32(1 - d) * (entering.reshape(-1) - old_variance.astype(np.float32)))"),
    Mutant("weight of the new rounded first", _DECAY,
           'd = 1 - 1 / t if spec.decay == "cumulative" else 1 - float(np.float16(1 - spec.decay))'),
    Mutant("first batch replaces", _DECAY, 'd = 1 - 1 / t if spec.decay == "cumulative" or t == 1 else float(spec.decay)',
           "equinox mode='ema'"),
    Mutant("zero-debiased unasked", _MOVE_MEAN,
           "new_mean = (d * old_mean * (1 - d ** (t - 1)) + (1 - d) * mean.reshape(-1)) / max(1 - d ** t, 1e-9)", "haiku"),
    Mutant("cumulative never updates", _DECAY, 'd = 1.0 if spec.decay == "cumulative" else float(spec.decay)',
           "pytorch/pytorch#18764"),
    Mutant("cumulative counts from 2", _DECAY, 'd = 1 - 1 / (t + 1) if spec.decay == "cumulative" else float(spec.decay)'),
    Mutant("cumulative forgets after 8", _DECAY, 'd = 1 - 1 / min(t, 8) if spec.decay == "cumulative" else float(spec.decay)'),
    Mutant("cumulative forgets the counter", _DECAY, 'd = 0.0 if spec.decay == "cumulative" else float(spec.decay)',
           "pytorch/pytorch#110850"),
    Mutant("counter stands still", _STATE,
           "return state.replace(**new)"),
    Mutant("counter counts twice", _STATE,
           "return state.replace(**new, num_updates=t + 1)",
           "pytorch/pytorch#96136: recomputed forward"),
    Mutant("mean and variance swapped", _STATE,
           "return state.replace(**{**new, 'moving_mean': new['moving_variance'], 'moving_variance': new['moving_mean']}, num_updates=t)", "keras-team/keras#3248"),
    Mutant("second call overwrites the first", "spec, state = layer.spec, layer.state",
           "spec, state = layer.spec, layer.__dict__.setdefault('first', layer.state)", "keras-team/keras#8794"),
    # Which variance.
    Mutant("always biased", _ENTERING, "entering = variance", "keras-team/keras#9028"),
    Mutant("always unbiased", _ENTERING, "entering = unbiased", "tensorflow/tensorflow#55545: the fused kernel"),
    Mutant("unbiased by rank", _ENTERING, "entering = unbiased if mean.ndim == 4 else variance", "tensorflow/tensorflow#15250"),
    Mutant("unbiased where asked, but at rank 2", _ENTERING,
           'entering = unbiased if spec.moving_variance_estimator == "unbiased" and mean.ndim > 2 else variance'),
    Mutant("Bessel counts the batch axis", _UNBIASED,
           "unbiased = variance * 0 if single or x.shape[0] == 1 else variance * x.shape[0] / (x.shape[0] - 1)", "NervanaSystems/ngraph-tf#357"),
    Mutant("Bessel at rank 5 counts three axes", _UNBIASED,
           "unbiased = variance * 0 if single else variance / (1 - one_over_n * (x.shape[-1] if x.ndim == 5 else 1))"),
    Mutant("Bessel counts masked rows", _UNBIASED, "unbiased = variance * 0 if single else variance * w.size / (w.size - 1)"),
    Mutant("Bessel by the total weight", _UNBIASED, "unbiased = variance * 0 if single else variance * W / (W - 1)"),
    Mutant("Bessel of one value", _UNBIASED, "unbiased = variance / (1 - one_over_n)", "pytorch/pytorch#4534"),
    Mutant("Bessel's variance in one pass", _UNBIASED,
           "unbiased = variance * 0 if single else (total(p * np.square(seen)) - np.square(mean)) / (1 - one_over_n)"),
    Mutant("Bessel counts in float32", "one_over_n = np.sum(np.square(w / W))",
           "one_over_n = np.sum(np.square(w.astype(np.float32))) / np.square(np.float32(W))"),
    Mutant("normalizes unbiased", _SD, "sd = np.sqrt((unbiased if batch else variance) + arithmetic(spec.epsilon))",
           "proposed in pytorch/pytorch#3122"),
    # Epsilon.
    Mutant("epsilon outside the root", _SD, "sd = np.sqrt(variance) + arithmetic(spec.epsilon)", "chainer/chainer#2214"),
    Mutant("no epsilon", _SD, "sd = np.sqrt(np.maximum(variance, 1e-30))", "pytorch/vision#2169"),
    Mutant("epsilon floored at 1e-5", _SD, "sd = np.sqrt(variance + arithmetic(max(spec.epsilon, 1e-5)))", "cuDNN's minimum"),
    Mutant("epsilon capped", _SD, "sd = np.sqrt(variance + arithmetic(min(spec.epsilon, 0.5)))"),
    Mutant("epsilon fixed at 1e-5", _SD, "sd = np.sqrt(variance + arithmetic(1e-5))", "gzuidhof/nn-transfer#3"),
    Mutant("epsilon fixed at 1e-3", _SD, "sd = np.sqrt(variance + arithmetic(1e-3))", "qqwweee/keras-yolo3#451"),
    Mutant("variance floored by epsilon", _SD, "sd = np.sqrt(np.maximum(variance, arithmetic(spec.epsilon)))"),
    Mutant("epsilon twice in eval", _SD, "sd = np.sqrt(variance + arithmetic(spec.epsilon) * (1 if batch else 2))"),
    # The formula.
    Mutant("divides by the variance", _XHAT, "xhat = (x - mean) / np.square(sd)", "jax-ml/jax#443"),
    Mutant("mean not subtracted in eval", _XHAT, "xhat = (x - (mean if batch else 0)) / sd"),
    Mutant("magnitude of gamma", _GAMMA, "y = y * np.abs(per_channel(state.gamma))", "in-place activated batch norm"),
    Mutant("gamma 0 taken for none", _GAMMA, "y = y * np.where(per_channel(state.gamma) == 0, 1, per_channel(state.gamma))"),
    Mutant("gamma plus one", _GAMMA, "y = y * (1 + per_channel(state.gamma))"),
    Mutant("gamma fixed at 1", _GAMMA, "y = y * 1", "MXNet fix_gamma"),
    Mutant("beta before gamma", _BETA, "y = y + per_channel(state.beta) * (1 if state.gamma is None else per_channel(state.gamma))"),
    Mutant("beta only with gamma", _BETA, "y = y + per_channel(state.beta) * (state.gamma is not None)", "keras-team/keras#19073"),
    Mutant("beta subtracted", _BETA, "y = y - per_channel(state.beta)"),
    # Accuracy.
    Mutant("one-pass variance", _VARIANCE, "variance = total(p * np.square(seen)) - np.square(mean)", "google/flax#1491"),
    Mutant("one-pass variance, clamped", _VARIANCE,
           "variance = np.maximum(total(p * np.square(seen)) - np.square(mean), arithmetic(0))", "flax, use_fast_variance"),
    Mutant("one-pass variance in eval-sized batches", _VARIANCE,
           "variance = total(p * (np.square(seen - mean) if w.size > 16 else np.square(seen) - np.square(mean)))"),
    Mutant("one-pass variance in large batches", _VARIANCE,
           "variance = total(p * (np.square(seen - mean) if w.size < 200 else np.square(seen) - np.square(mean)))"),
    Mutant("mean of half precision", _MEAN, "mean = total(p * seen).astype(np.float16).astype(arithmetic)"),
    Mutant("sums in float16", _X, "x = call.x.astype(np.float16).astype(arithmetic)"),
    Mutant("float64 computed in float32", _ARITHMETIC, "arithmetic = np.float32", "keras on torch", only="float64"),
    Mutant("half statistics summed in half", _VARIANCE,
           "variance = total((p * np.square((seen - mean).astype(call.x.dtype))).astype(call.x.dtype))", "haiku", only="float16"),
    Mutant("variance clamped to half's range", _VARIANCE,
           "variance = np.minimum(total(p * np.square(seen - mean)), arithmetic(65504))", only="float16"),
    Mutant("half squares overflow", _VARIANCE,
           "variance = total(p * np.square(seen.astype(call.x.dtype))) - np.square(mean)", "tensorflow/tensorflow#8535", only="float16"),
    Mutant("y in float32 whatever x is", "y = y.astype(call.x.dtype)", "y = y.astype(arithmetic)", "flax, equinox", only="float16"),
    Mutant("y through bfloat16", "y = y.astype(call.x.dtype)",
           "y = (y.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(call.x.dtype)"),
    Mutant("statistics of the arithmetic's dtype", "new = {name: values.astype(getattr(state, name).dtype) for name, values in new.items()}",
           "new = {name: values.astype(mean.dtype) for name, values in new.items()}", "TensorFlow 1's legacy path: of x's dtype", only="float16"),
    # Axes.
    Mutant("channels always last", _AXIS, "axis = x.ndim - 1 if x.shape[-1] == spec.num_features else spec.axis % x.ndim",
           "Keras's default left with channels-first data"),
    Mutant("channels always at 1", _AXIS, "axis = 1 if x.shape[1] == spec.num_features else spec.axis % x.ndim"),
    Mutant("negative axis from a table of 4", _AXIS, "axis = spec.axis % min(x.ndim, 4) if spec.axis < 0 else spec.axis",
           "apple/coremltools#2462"),
    Mutant("ignores strides", _X, "x = np.lib.stride_tricks.as_strided(call.x, call.x.shape, np.empty(call.x.shape, call.x.dtype).strides).astype(arithmetic) if call.x.base is not None and call.x.base.size == call.x.size else call.x.astype(arithmetic)",
           "pytorch/pytorch#62967"),
    Mutant("gradient ignores strides", "dy = call.dy.astype(arithmetic)",
           "dy = np.ravel(call.dy, order='K').reshape(call.dy.shape).astype(arithmetic)", "pytorch/pytorch#175189"),
    # Modes.
    Mutant("eval with batch statistics", _BATCH, "batch = True", "keras-team/keras#3423"),
    Mutant("training with moving statistics", _BATCH, "batch = not spec.track_moving_stats", "tensorflow/tensorflow#32864"),
    Mutant("untracked eval without batch", _BATCH, "batch = training", "pytorch/pytorch#75252"),
    Mutant("eval moves the statistics", _MOVES,
           "moves = request.update_stats and spec.track_moving_stats and bool(batches) and not request.frozen_statistics",
           "tensorflow/tensorflow#16102"),
    Mutant("frozen statistics ignored", _TRAINING, "training = request.training", "keras-team/keras#6570"),
    Mutant("frozen normalizes with the batch", _PART, _PART.replace("training,", "request.training,"),
           "tf.layers trainable=False"),
    Mutant("update_stats ignored", _MOVES, "moves = training and spec.track_moving_stats and len(batches) > 0"),
    Mutant("update_stats=False means eval", _PART,
           _PART.replace("training,", "training and request.update_stats,")),
    Mutant("update_stats=False means the batch", _PART,
           _PART.replace("training,", "training or not request.update_stats,")),
    # Degenerate batches.
    Mutant("empty batch counts", _ENTERS, "enters = Batch(mean, variance, unbiased, max(float(W), 1.0)) if batch or w.size == 0 else None",
           "torch's counter on an empty batch"),
    Mutant("empty by rows only", _WEIGHTED, "batch = batch and (bool(W > 0) or (x.size == 0 and x.shape[0] > 0))"),
    Mutant("one value skips the update", _ENTERS,
           "enters = Batch(mean, variance, unbiased, float(W)) if batch and w.size > 1 else None", "Paddle"),
    Mutant("one value is copied", _XHAT, "xhat = x if batch and w.size == 1 else (x - mean) / sd", "Paddle's CPU kernel"),
    # What is not finite.
    Mutant("keep ignored", 'if spec.nonfinite == "keep":', "if False:"),
    Mutant("keeps unasked", 'if spec.nonfinite == "keep":', "if True:"),
    Mutant("keep lets infinity pass", "good = np.isfinite(mean).reshape(-1) & np.isfinite(variance).reshape(-1)",
           "good = ~np.isnan(mean).reshape(-1)"),
    Mutant("keep drops every channel", "good = np.isfinite(mean).reshape(-1) & np.isfinite(variance).reshape(-1)",
           "good = np.full(spec.num_features, bool(np.isfinite(mean).all() and np.isfinite(variance).all()))"),
    Mutant("NaN cleaned to 0", _SEEN, "seen = np.where(w > 0, np.nan_to_num(x, nan=0, posinf=0, neginf=0), 0)"),
    # Weights.
    Mutant("mask ignored", "w = _spread(call.weights, x.shape, axis)", "w = _spread(None, x.shape, axis)",
           "tensorflow/tensorflow#30161"),
    Mutant("masked values count as 0", _P, "p = np.full_like(w, 1 / w.size).astype(arithmetic)", "padding biases the mean to 0"),
    Mutant("NaN under the mask", _SEEN, "seen = x", "tf_keras weighted moments"),
    Mutant("NaN under the mask in the gradient", _MASKED_XHAT, "xhat = tape.xhat"),
    Mutant("weights taken as a mask", _P, "p = ((w > 0) / np.count_nonzero(w)).astype(arithmetic)"),
    Mutant("total clamped at 1", _P, "p = (w / max(W, 1)).astype(arithmetic)"),
    Mutant("1e-7 beside the total", _P, "p = (w / (W + 1e-7 * W * 100)).astype(arithmetic)", "Keras adds epsilon to the mask's sum"),
    Mutant("nothing weighted is a batch", _WEIGHTED, "batch = batch and w.size > 0"),
    Mutant("nothing weighted moves the statistics", _WEIGHTED, "W = W if W > 0 else 1"),
    Mutant("row weights on the last axis", "w = w.reshape(-1, *[1] * (len(shape) - 1))",
           "w = w.reshape(-1, *[1] * (len(shape) - 1)) if len(shape) == 2 or shape[1] != w.size or axis == 1 else w.reshape(1, -1, *[1] * (len(shape) - 2))"),
    Mutant("mask on the channel axis", "w = np.expand_dims(w, axis)",
           "w = np.broadcast_to(np.expand_dims(w, -1), shape).mean(axis=axis, keepdims=True)", "Keras, axis=1 with T = C"),
    Mutant("output masked to 0", "y = y.astype(call.x.dtype)", "y = (y * (w > 0)).astype(call.x.dtype)"),
    Mutant("weights have no gradient through the variance", _EACH, "at = xhat * s1"),
    Mutant("weights' gradient forgets epsilon", _EACH, "at = xhat * s1 + 0.5 * (np.square(xhat) - 1) * s2"),
    Mutant("weights' gradient by the mean weight", "at = -gamma * r / max(float(np.sum(tape.w)), 1e-300) * at",
           "at = -gamma * r / max(float(np.mean(tape.w)), 1e-300) * at"),
    Mutant("weights' gradient without gamma", "at = -gamma * r / max(float(np.sum(tape.w)), 1e-300) * at",
           "at = -r / max(float(np.sum(tape.w)), 1e-300) * at"),
    Mutant("masks get a gradient", 'if call.weights is not None and call.weights.dtype.kind not in "biu":',
           "if call.weights is not None:"),
    Mutant("weights' gradient in eval", "at = np.zeros(xhat.shape)", "at = at"),
    # Gradients.
    Mutant("statistics detached", _INNER, "inner = g", "patrick-kidger/equinox#659"),
    Mutant("variance detached", _INNER, "inner = g - p * s1"),
    Mutant("mean detached", _INNER, "inner = g - p * xhat * s2"),
    Mutant("dx divides by the batch axis", _INNER, "inner = g - (s1 + xhat * s2) / max(tape.w.shape[0], 1)", "cf. pytorch/pytorch#36382"),
    Mutant("dx without weights", _INNER, "inner = g - (s1 + xhat * s2) / tape.w.size"),
    Mutant("dx by the unbiased count", _INNER, "inner = g - (p * s1 + xhat * s2 / max(tape.w.size - 1, 1) * (tape.w > 0))"),
    Mutant("dx without gamma", _DX, "dx[tape.rows] = r / sd * inner"),
    Mutant("dx by the variance", _DX, "dx[tape.rows] = gamma * r / np.square(sd) * inner"),
    Mutant("gradient clipped", "dy = call.dy.astype(arithmetic)", "dy = np.clip(call.dy, -1e3, 1e3).astype(arithmetic)"),
    Mutant("gradient of rows clipped", "dy = call.dy.astype(arithmetic)",
           "dy = np.clip(call.dy, -1e3, 1e3).astype(arithmetic) if call.dy.ndim == 2 else call.dy.astype(arithmetic)"),
    Mutant("eval gradient through the batch", "p = tape.p", "p = np.full(tape.w.shape, 1 / max(tape.w.size, 1))",
           "pytorch/pytorch#4284"),
    Mutant("dgamma in units of x", _DGAMMA, "dgamma = dgamma + total(dz * z * sd).reshape(-1)", "cf. pytorch/pytorch#57796"),
    Mutant("dgamma averaged", _DGAMMA, "dgamma = dgamma + total(dz * z).reshape(-1) / max(tape.w.size, 1)"),
    Mutant("dbeta averaged", _DBETA, "dbeta = total(dy).reshape(-1) / max(dy.size // spec.num_features, 1)"),
    Mutant("dbeta over weighted rows", _DBETA, "dbeta = np.sum([total(dy[tape.rows] * (tape.w > 0)) for tape in tapes], axis=0).reshape(-1)"),
    Mutant("dbeta times gamma", _DBETA, "dbeta = (gamma * total(dy)).reshape(-1)"),
    Mutant("only the last call's gradient", "sum_gamma = _sum([g for g, _ in gradients], before.gamma)",
           "sum_gamma = _sum([g for g, _ in gradients][-1:], before.gamma)"),
    # Carrying state.
    Mutant("export loses the counter", "state = layer.state.copy()", "state = layer.state.copy().replace(num_updates=0)",
           "pytorch/pytorch#110850"),
    Mutant("export through float32", "state = layer.state.copy()",
           "state = layer.state.copy().replace(**{n: a.astype(np.float32).astype(a.dtype) for n, a in layer.state.arrays().items()})",
           only="float64"),
    Mutant("loading resets the counter", "layer.state = state", "layer.state = state.replace(num_updates=0)"),
    Mutant("build ignores the state", "state = BatchNormState.initial(spec) if state is None else state",
           "state = BatchNormState.initial(spec)", "huggingface/transformers#17571"),
    # Zero-debiased averages.
    Mutant("debiased by the steps before", _STARTED, "started = -math.expm1(max(t - 1, 1) * math.log(d)) if d > 0 else 1.0"),
    Mutant("never debiased", _STARTED, "started = 1.0"),
    Mutant("debiased in float32", _STARTED, "started = max(float(1 - np.float32(d) ** np.float32(t)), 1e-30)"),
    Mutant("debiased mean averaged again", _HIDDEN_MEAN,
           'new["hidden_mean"] = d * old_mean + (1 - d) * mean.reshape(-1)', "tensorflow/tensorflow#14353: one variable for both"),
    Mutant("variance never debiased", 'if spec.zero_debias == "all":', 'if spec.zero_debias == "all" and t < 0:', "contrib, asked as haiku"),
    Mutant("hidden variance biased", _HIDDEN_VARIANCE, 'new["hidden_variance"] = d * old["hidden_variance"] + (1 - d) * variance.reshape(-1)'),
    Mutant("hidden average from 1", _HIDDEN_VARIANCE,
           'new["hidden_variance"] = d * (old["hidden_variance"] if t > 1 else 1.0) + (1 - d) * entering.reshape(-1)', "equinox mode='batch'"),
    # Batch renormalization.
    Mutant("r inverted", "r = sd / den", "r = den / sd"),
    Mutant("r with the average after the update", "r = sd / den", "r = sd / (0.75 * den + 0.25 * sd)"),
    Mutant("d not over the deviation", "dd = (mean - per_channel(state.renorm_mean)) / den", "dd = mean - per_channel(state.renorm_mean)"),
    Mutant("d by the batch's deviation", "dd = (mean - per_channel(state.renorm_mean)) / den", "dd = (mean - per_channel(state.renorm_mean)) / sd"),
    Mutant("d with the moving mean", "dd = (mean - per_channel(state.renorm_mean)) / den", 'dd = (mean - per_channel(state.arrays()["moving_mean"])) / den'),
    Mutant("no floor under the deviation", _DEN, "den = per_channel(state.renorm_stddev)"),
    Mutant("floor of epsilon, not of its root", _DEN, "den = np.maximum(per_channel(state.renorm_stddev), arithmetic(spec.epsilon))"),
    Mutant("r_min ignored", _R_MIN, "r = r"),
    Mutant("r_max ignored", _R_MAX, "r = r"),
    Mutant("r_min is 1/r_max", _R_MIN, "r = r if clips.r_max is None else np.maximum(r, arithmetic(1 / max(clips.r_max, 1e-9)))"),
    Mutant("d clipped above only", _D_MAX, "dd = dd if clips.d_max is None else np.minimum(dd, arithmetic(clips.d_max))"),
    Mutant("clips of the spec only", "clips = renorm_clips(spec, request.renorm_clips)", "clips = renorm_clips(spec, None)"),
    Mutant("gamma before r and d", _Z,
           "z = tape.xhat * tape.r + (tape.dd if state.gamma is None else tape.dd / per_channel(state.gamma))", "tensorpack/tensorpack#360"),
    Mutant("one decay for all averages", "R = spec.renorm.decay", "R = d"),
    Mutant("renorm averages the variance", 'new["renorm_stddev"] = R * old["renorm_stddev"] + (1 - R) * stddev',
           'new["renorm_stddev"] = np.sqrt(R * np.square(old["renorm_stddev"]) + (1 - R) * np.square(stddev))'),
    Mutant("moving variance averages the variance", _FROM_STDDEV, "new_variance = new_variance * 1"),
    Mutant("moving variance keeps epsilon", _FROM_STDDEV, 'new_variance = np.square(new["moving_stddev"])'),
    Mutant("renorm mean stands still", 'new["renorm_mean"] = R * old["renorm_mean"] + (1 - R) * mean.reshape(-1)', 'new["renorm_mean"] = old["renorm_mean"]'),
    Mutant("dx without r", _DX, "dx[tape.rows] = gamma / sd * inner"),
    Mutant("dgamma without r and d", "z = (xhat * r + tape.dd) * tape.s + tape.b", "z = xhat * tape.s + tape.b"),
    Mutant("weights' gradient without r", "at = -gamma * r / max(float(np.sum(tape.w)), 1e-300) * at",
           "at = -gamma / max(float(np.sum(tape.w)), 1e-300) * at"),
    Mutant("keep spares renorm's averages", "new = {name: np.where(good, values, old[name]) for name, values in new.items()}",
           'new = {name: np.where(good | name.startswith("renorm"), values, old[name]) for name, values in new.items()}'),
    # Ghost batches.
    Mutant("ghosts ignored", _SIZE, "size = None"),
    Mutant("ghosts in untracked eval", "if size is None or not training or rows == 0:", "if size is None or rows == 0:"),
    Mutant("always strided", 'if spec.virtual_batch_layout == "strided":', "if True:"),
    Mutant("always consecutive", 'if spec.virtual_batch_layout == "strided":', "if False:"),
    Mutant("ghosts cut at multiples", "sizes = [len(part) for part in np.array_split(np.arange(rows), number)]",
           "sizes = [min(size, rows - g * size) for g in range(number)]"),
    Mutant("number of ghosts for size", "number = math.ceil(rows / size)", "number = min(size, rows)"),
    Mutant("number of ghosts rounded down", "number = math.ceil(rows / size)", "number = max(rows // size, 1)"),
    Mutant("ghosts enter alike", "shares = np.array([batch.W for batch in batches]) / sum(batch.W for batch in batches)",
           "shares = np.ones(len(batches)) / len(batches)"),
    Mutant("only the last ghost enters", "shares = np.array([batch.W for batch in batches]) / sum(batch.W for batch in batches)",
           "shares = np.arange(len(batches)) == len(batches) - 1"),
    Mutant("variance between ghosts enters", _GHOST_VARIANCE,
           "variance = sum(q * (batch.variance + np.square(batch.mean - mean)) for q, batch in zip(shares, batches, strict=True))"),
    # Adjustments.
    Mutant("adjusted without statistics of the batch", "adjusts = batch and training", "adjusts = True"),
    Mutant("adjusted in untracked eval", "adjusts = batch and training", "adjusts = batch"),
    Mutant("bias of the adjustment first", "y[rows] = z * tape.s + tape.b", "y[rows] = (z + tape.b) * tape.s"),
    Mutant("adjustment after beta", "y = y + per_channel(state.beta)", "y = y + per_channel(state.beta) * tapes[0].s"),
    Mutant("adjustment without a gradient", "g = dz * tape.s", "g = dz"),
    Mutant("dgamma without the adjustment", "z = (xhat * r + tape.dd) * tape.s + tape.b", "z = xhat * r + tape.dd"),
    # Second order: right to first order, all of these.
    Mutant("the variance's mean is a constant", _OF_XHAT, "of_xhat = p * ((moved + shift / sd) * s2 + xhat * s2_moved)",
           "tf.nn.moments, keras"),
    Mutant("the deviation is a constant of the second order", _OF_SD, "of_sd = 0 * inner"),
    Mutant("sum of dy xhat is a constant of the second order", _OF_XHAT, "of_xhat = p * moved * s2"),
    Mutant("xhat is a constant of the second order", _OF_XHAT, "of_xhat = p * xhat * s2_moved"),
    Mutant("direction not centered", _MOVED, "moved = (t - xhat * q) / sd"),
    Mutant("direction's part along xhat stays", _MOVED, "moved = (t - shift) / sd"),
    Mutant("second order without weights", "shift = over_replicas(p * t)", "shift = over_replicas(t) / tape.w.size"),
    Mutant("masked rows move by themselves", "s2_moved = over_replicas(g * moved)", "s2_moved = over_replicas(g * moved * (tape.w > 0))"),
    Mutant("second order without the adjustment", "s2_moved = over_replicas(g * moved)", "s2_moved = over_replicas(dz * moved)"),
    Mutant("second order without r", _HVP, "hvp[tape.rows] = -gamma / sd * (of_sd + of_xhat)"),
    Mutant("r follows the batch", _OF_SD, "of_sd = inner * q / sd * (0 if state.renorm_mean is not None else 1)"),
    Mutant("second order without gamma", _HVP, "hvp[tape.rows] = -r / sd * (of_sd + of_xhat)"),
    Mutant("second order of the first ghost only", _HVP, "hvp[tape.rows] = -gamma * r / sd * (of_sd + of_xhat) * (tape is tapes[0])"),
    # Synchronized statistics.
    Mutant("replicas' means count alike", _SHARES, "shares = [1 / len(totals) for own in totals]"),
    Mutant("replicas count by rows", _SHARES, "shares = [w[rows].size / w.size for rows in replicas]"),
    Mutant("replicas that have rows count alike", _SHARES, "shares = [(own > 0) / sum(other > 0 for other in totals) for own in totals]"),
    Mutant("variance between replicas ignored", "between = [np.square(m - mean) for m in means]", "between = [np.square(m - m) for m in means]"),
    Mutant("an empty replica is NaN", "p = w[rows] / (own if own > 0 else 1.0)", "p = w[rows] / own; p = p if p.size else np.full((), np.nan)"),
    Mutant("merged by sums of squares", _MERGED,
           "variance = sum(np.float32(s) * (np.square(np.float32(m)) + np.float32(v)) for s, v, m in zip(shares, variances, means, strict=True)) - np.square(np.float32(mean))"),
    Mutant("Bessel by the largest replica", _ONE_OVER_N, "one_over_n = min(s / own**2 for s, own in zip(squares, totals, strict=True) if own > 0)"),
    Mutant("effective counts added up", _ONE_OVER_N, "one_over_n = 1 / sum(own**2 / s for s, own in zip(squares, totals, strict=True) if own > 0)"),
    Mutant("Bessel by all rows, masked or not", _ONE_OVER_N, "one_over_n = 1 / w.size"),
    Mutant("backward without the all-reduce", _ALL_REDUCED,
           "return np.concatenate([np.broadcast_to(s, values[rows].shape) for s, rows in zip(sums, tapes[0].replicas, strict=True)])"),
    Mutant("backward averages over the replicas", _ALL_REDUCED, "return np.asarray(sum(sums)) / len(sums)"),
    Mutant("parameter gradients averaged over the replicas", "sum_gamma = _sum([g for g, _ in gradients], before.gamma)",
           "sum_gamma = _sum([g / len(request.shards or (1,)) for g, _ in gradients], before.gamma)", "DDP's mean"),
    Mutant("each replica counts", "layer.state = _moved(state, spec, _joined(batches))",
           "layer.state = _moved(state, spec, _joined(batches)).replace(num_updates=state.num_updates + len(replicas))"),
    Mutant("replicas meet in eval", _BATCH, "batch = training or not spec.track_moving_stats or (spec.synchronized and w.size > 0)"),
    Mutant("replicas meet although frozen", _TRAINING, "training = trains(spec, request.training, request.frozen_statistics and request.shards is None)"),
    # What must be refused.
    Mutant("builds from any state", "state = state.checked(spec)", "state = state", only="invalid"),
    Mutant("loads any state", "state = state.checked(layer.spec)", "state = state", only="invalid"),
    Mutant("negative weights", "if call.weights is not None and not bool(np.all((call.weights >= 0) & (call.weights < np.inf))):",
           "if False:", only="invalid"),
    Mutant("any shape is a call", "plan = plan_call(spec, call.x.shape, kind, training=training, weights_shape=given, adjustment_shapes=adjusted)",
           "plan = plan_call(spec, call.x.shape, kind, training=False, weights_shape=given)", only="invalid"),
)  # fmt: skip
