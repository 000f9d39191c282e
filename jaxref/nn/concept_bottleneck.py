"""Classification by way of named concepts: a bottleneck to train, and a search that needs none."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_floating
from jaxref.core.numerics import compute_dtype
from jaxref.core.vectors import unit_vectors
from jaxref.nn.linear import Linear


class ConceptBottleneck(nnx.Module):
    """Two linear maps from similarities with concepts: to concepts, and from these to classes.

        c = u W,   y = c V

    The activations c say how much of each named concept an image has, and V what follows from it.
    W is trained by one of the losses of `jaxref.losses` for it, `gumbel_contrastive_loss`,
    `l1_bottleneck_penalty`, `diagonal_contrastive_loss` or `cubic_cosine_similarity_loss`, beside
    the cross-entropy of y, whose gradient reaches W in the released code, too.

    Args:
      num_concepts: M at least 1.
      num_classes: C at least 1.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.

    Attributes:
      concepts: the `Linear` of W, `[M, M]` without bias.
      head: the `Linear` of V, `[M, C]` without bias.

    Raises:
      ValueError: an input whose last axis is not M.

    Use it behind a frozen contrastive model, whose similarities of images with the texts of the
    concepts it takes; `concept_matrix_search` classifies by them without training.

    Cost: M · (M + C) parameters, as many multiplications an image.

    Example:
      >>> bottleneck = ConceptBottleneck(5, 3, rngs=nnx.Rngs(0))
      >>> concepts, logits = jax.eval_shape(bottleneck, jnp.ones((2, 5)))
      >>> concepts.shape, logits.shape
      ((2, 5), (2, 3))

    Reference: Semenov, Ivanov, Beznosikov, Gasnikov, "Sparse Concept Bottleneck Models: Gumbel
    Tricks in Contrastive Learning", 2024, arXiv:2404.03323.
    """

    def __init__(
        self,
        num_concepts: int,
        num_classes: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def project(outputs: int) -> Linear:
            axes = ("embed", None)
            return Linear(
                num_concepts, outputs, axes=axes, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.concepts = project(num_concepts)
        self.head = project(num_classes)

    def __call__(self, similarities: Array) -> tuple[Array, Array]:
        """Activations `[..., M]` and class logits `[..., C]` of similarities `[..., M]`."""
        activations = self.concepts(similarities)
        return activations, self.head(activations)


def concept_matrix(embeddings: ArrayLike, concepts: ArrayLike) -> Array:
    r"""Each embedding as a mixture of concepts, by its cosines with them.

        V_ij = cos(e_i, t_j) / (Σ_k cos(e_i, t_k) + 1e-8)

    Args:
      embeddings: e `[n, features]` floating point, of images or of the names of classes.
      concepts: t `[concepts, features]`, of the concepts' texts.

    Returns:
      V `[n, concepts]` in the type of `embeddings`, with rows of sum 1 where their cosines do not
      cancel. A zero vector has cosine 0 with any.

    Raises:
      ValueError: shapes that do not match.
      TypeError: embeddings that are not floating point.

    Use it for both arguments of `concept_matrix_search`, and to see what an image is made of.

    Cost: one product, n · concepts · features multiplications.

    Example:
      >>> concepts = jnp.array([[1.0, 0.0], [3.0, 3.0]])
      >>> print(jax.jit(concept_matrix)(jnp.array([[2.0, 0.0]]), concepts).round(3))
      [[0.586 0.414]]

    Reference: Semenov, Ivanov, Beznosikov, Gasnikov, "Sparse Concept Bottleneck Models: Gumbel
    Tricks in Contrastive Learning", 2024, arXiv:2404.03323.
    """
    e, t = _matrices(embeddings=embeddings, concepts=concepts)
    cosines = _product(unit_vectors(e), unit_vectors(t))
    total = jnp.sum(cosines, axis=-1, keepdims=True) + 1e-8
    rows = cosines / jnp.where(total == 0, 1.0, total)
    return rows.astype(jnp.result_type(embeddings))


def concept_matrix_search(
    image_concepts: ArrayLike, class_concepts: ArrayLike, *, cubed: bool = False
) -> Array:
    r"""How alike images and classes are in their concepts (Concept Matrix Search).

        S_ik = cos(V_i, T_k),   or cos(V_i³, T_k³) with `cubed`

    with cubes by element, which weigh the strongest concepts most. The class of image i is
    argmax_k S_ik.

    Args:
      image_concepts: V `[images, concepts]` floating point, as of `concept_matrix`.
      class_concepts: T `[classes, concepts]`.
      cubed: whether to take cubes. Default: no.

    Returns:
      S `[images, classes]` in [-1, 1], in the type of `image_concepts`; 0 for a row of zeros.

    Raises:
      ValueError: shapes that do not match.
      TypeError: matrices that are not floating point.

    Use it to classify by concepts without any training, and to see by which; a
    `ConceptBottleneck` learns them from labels.

    Cost: one product, images · classes · concepts multiplications; no training.

    Example:
      >>> images = jnp.array([[0.1, 0.2, 0.7]])
      >>> classes = jnp.array([[0.8, 0.2, 0.0], [0.0, 0.3, 0.7]])
      >>> print(jax.jit(concept_matrix_search)(images, classes).round(2))
      [[0.2  0.98]]

    Reference: Semenov, Ivanov, Beznosikov, Gasnikov, "Sparse Concept Bottleneck Models: Gumbel
    Tricks in Contrastive Learning", 2024, arXiv:2404.03323.
    """
    v, t = _matrices(image_concepts=image_concepts, class_concepts=class_concepts)
    if cubed:
        v, t = (jnp.power(_relative_to_largest(x), 3) for x in (v, t))
    similarity = _product(unit_vectors(v), unit_vectors(t))
    return similarity.astype(jnp.result_type(image_concepts))


def _matrices(**named: ArrayLike) -> list[Array]:
    """Two matrices with as many columns, in the type to compute in."""
    check_floating(**named)
    (first, second) = named.values()
    for name, matrix in named.items():
        if jnp.ndim(matrix) != 2 or jnp.shape(matrix)[1] != jnp.shape(first)[-1]:
            columns = "..." if matrix is first else jnp.shape(first)[-1]
            raise ValueError(f"{name} must have shape [n, {columns}], got {jnp.shape(matrix)}")
    dtype = compute_dtype(first, second)
    return [jnp.asarray(matrix).astype(dtype) for matrix in (first, second)]


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def _relative_to_largest(x: Array) -> Array:
    """Rows over their largest size, so that no cube vanishes or overflows."""
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=-1, keepdims=True, initial=0.0)
    return x / jnp.where(largest > 0, largest, 1.0)
