import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sophia_optax import gnb, sophia_g, sophia_metrics, unclipped_fraction


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)  # with statistics that are no parameters
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(nnx.gelu(self.norm(self.up(x)))))


def test_nnx_optimizer():
    """As README has it: the estimator is made of the split model, inside the step."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sophia_g(0.03, b1=0.5, debias=True), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (32, 4))
    y = jnp.argmax(x[:, :3], 1)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def logits_fn(params, x):
            copy = nnx.merge(graph, params, rest)
            copy.eval()
            return copy(x)

        estimate = gnb(logits_fn, groups=4)
        optimizer.update(model, grads, hessian_fn=lambda key: estimate(params, x, key=key))
        return loss

    losses = [step(model, optimizer) for _ in range(21)]
    assert losses[-1] < 0.5 * losses[0]
    assert jnp.all(model.norm.mean[...] != 0)  # training itself goes on with statistics
    assert 0 < unclipped_fraction(optimizer.opt_state) < 1
    metrics = sophia_metrics(optimizer.opt_state)
    assert metrics["refreshes"] == 3
    assert {k: type(v) for k, v in metrics.items() if not isinstance(v, jax.Array)} == {}
