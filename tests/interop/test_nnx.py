import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sophia_optax import gnb, sophia_g, sophia_metrics, unclipped_fraction


def test_nnx_optimizer():
    """`nnx.Optimizer` hands `hessian_fn` on, and its state is understood."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sophia_g(0.1, b1=0.5, debias=True), wrt=nnx.Param)
    graph, _ = nnx.split(model)
    estimate = gnb(lambda params, x: nnx.merge(graph, params)(x), groups=4)
    x, y = jnp.eye(4), jnp.array([0, 1, 2, 0])

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        params = nnx.state(model, nnx.Param)
        optimizer.update(model, grads, hessian_fn=lambda key: estimate(params, x, key=key))
        return loss

    losses = [step(model, optimizer) for _ in range(21)]
    assert losses[-1] < 0.5 * losses[0]
    assert 0 <= unclipped_fraction(optimizer.opt_state) <= 1
    metrics = sophia_metrics(optimizer.opt_state)
    assert metrics["refreshes"] == 3
    assert {k: type(v) for k, v in metrics.items() if not isinstance(v, jax.Array)} == {}
