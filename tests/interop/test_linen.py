import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from sophia_optax import gnb, sophia_g, sophia_metrics


def test_train_state():
    """As README has it: `apply_gradients` forwards nothing, so the optimizer is called."""
    model = nn.Dense(3)
    x, y = jnp.eye(4), jnp.array([0, 1, 2, 0])
    estimate = gnb(lambda params, x: model.apply({"params": params}, x), groups=4)
    ts = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), x)["params"],
        tx=sophia_g(0.1, b1=0.5, debias=True),
    )

    @jax.jit
    def step(ts):
        def loss_fn(params):
            logits = ts.apply_fn({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(ts.params)
        updates, opt_state = ts.tx.update(
            grads,
            ts.opt_state,
            ts.params,
            hessian_fn=lambda key: estimate(ts.params, x, key=key),
        )
        params = optax.apply_updates(ts.params, updates)
        return ts.replace(step=ts.step + 1, params=params, opt_state=opt_state), loss

    losses = []
    for _ in range(21):
        ts, loss = step(ts)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert sophia_metrics(ts.opt_state)["refreshes"] == 3
