"""The sharding table: how parameters, by name, and activations, by kind, are split over the mesh.

It serves parameters, optimizer state and averages of every network. A dimension that an axis does
not divide stays whole, so small models run on any mesh.
"""

import re
from collections.abc import Callable, Mapping, Sequence, Set

import jax
from jax.sharding import PartitionSpec

AXES = ('data', 'fsdp', 'spatial', 'tensor')
"""Axes of the mesh. data: examples. fsdp: examples and parameters. spatial: rows of images, and so
of their positions. tensor: heads and inner channels of a layer; last, so that its devices, which
talk within every layer, are neighbours."""

EXAMPLES = ('data', 'fsdp')
BATCH = PartitionSpec(EXAMPLES)
"""For arrays with examples as their first dimension [b ...]."""

# Megatron's layout for tensor: the first matrix of a pair is split by columns, the second by rows,
# so that a pair needs one all-reduce. fsdp takes the other dimension.
RULES: list[tuple[str, PartitionSpec]] = [
  (r'(bias|scale|class_embedding|lambda1|clip_mean|clip_std|_tokens?|scale_shift_table)$',
   PartitionSpec()),
  (r'(to_out\.0|to_add_out|out_proj|fc2|linear_2|net\.2|SelfAttention\.o|wo|conv2|'
   r'output\.dense|weights_out)\.kernel$',
   PartitionSpec('tensor', 'fsdp')),
  (r'embeddings?$', PartitionSpec('tensor', 'fsdp')),
  (r'(kernel|pos_embed)$', PartitionSpec('fsdp', 'tensor')),
  # Adapters are split along their long side alone; the rank stays whole.
  (r'lora\.a$', PartitionSpec('fsdp', None)),
  (r'lora\.b$', PartitionSpec(None, 'fsdp')),
  (r'lora\.\w+$', PartitionSpec()),
]
"""Patterns of names of parameters; the first that is found counts."""

ACTIVATIONS: dict[str, PartitionSpec] = {
  # [b h w c]: an image, latents, or features between two blocks; and within a residual block.
  'image': PartitionSpec(EXAMPLES, 'spatial', None, None),
  'features': PartitionSpec(EXAMPLES, 'spatial', None, 'tensor'),
  # [b c]: conditions of an image as a whole, such as its time. Small, so that the partitioner would
  # rather gather it than the matrix it is multiplied with, many times over.
  'vector': PartitionSpec(EXAMPLES, None),
  # [b l c]: positions of an image, row by row, or of a text; and within a feed-forward layer.
  'tokens': PartitionSpec(EXAMPLES, 'spatial', None),
  'hidden': PartitionSpec(EXAMPLES, 'spatial', 'tensor'),
  # [b l heads d]. Each query sees all keys, so those are gathered over spatial.
  'queries': PartitionSpec(EXAMPLES, 'spatial', 'tensor', None),
  'keys': PartitionSpec(EXAMPLES, None, 'tensor', None),
}


def add_rules(*rules: tuple[str, PartitionSpec]) -> None:
  """Put rules for parameters of further names before RULES, once."""
  RULES[:0] = [rule for rule in rules if rule not in RULES]


def fitted(spec: PartitionSpec, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
  """Return the spec without axes, of such sizes, that do not divide their dimension."""
  def one(length: int, axes) -> str | tuple[str, ...] | None:
    ways = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
      ways *= sizes[axis]
    return axes if length % ways == 0 else None

  return PartitionSpec(*map(one, shape, (*spec, *[None] * (len(shape) - len(spec)))))


def parameter_spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
  """The sharding of the parameter of that name and shape; scalars are replicated.

  Rules are of the last two dimensions (input, output); leading ones, such as a convolution's
  window, stay whole. ValueError where none matches.
  """
  rule = next((rule for pattern, rule in RULES if re.search(pattern, name)), None)
  if rule is None:
    raise ValueError(
      f'no sharding rule matches the parameter {name!r}; add one by `parallel.layout.add_rules`.'
    )
  rule = tuple(rule)[: len(shape)]
  whole = (None,) * (len(shape) - max(len(rule), min(2, len(shape))))
  return fitted(PartitionSpec(*whole, *rule), shape, sizes)


def batch_spec(shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
  """The sharding of a field [b ...] of a batch; four dimensions are an image's [b h w c].

  The first is always split, so that a batch that does not fit is an error.
  """
  rest = fitted(ACTIVATIONS['image'], shape, sizes)[1:] if len(shape) == 4 else ()
  return PartitionSpec(EXAMPLES, *rest)


def constrain(x: jax.Array, kind: str) -> jax.Array:
  """x, and its gradient, sharded on the mesh of `jax.set_mesh` by the kind's row in ACTIVATIONS.

  Without a mesh, or with one device, it is x itself.
  """
  sizes = mesh_sizes()
  return jax.lax.with_sharding_constraint(x, _placed(x, kind, sizes)) if sizes else x


def on_each_device(
  function: Callable[..., jax.Array], kinds: Sequence[str], result: str, whole: bool = False
) -> Callable[..., jax.Array]:
  """A function of activations of these kinds that each device computes for its own part.

  For functions that portion examples and heads, across no devices. The result has the first
  argument's shape. whole: leave the compiler no axis, not even of one device, as kernels need it.
  """
  def call(*args: jax.Array) -> jax.Array:
    sizes = mesh_sizes()
    if not sizes:
      return function(*args)
    # Axes of one device are left to the compiler: a gradient would be summed over each of them.
    axes = set(sizes) if whole else {axis for axis in AXES if sizes.get(axis, 1) > 1}
    specs = tuple(_of(axes, _placed(x, kind, sizes)) for x, kind in zip(args, kinds, strict=True))
    out = _of(axes, _placed(args[0], result, sizes))
    return jax.shard_map(
      function, in_specs=specs, out_specs=out, axis_names=axes, check_vma=False
    )(*args)

  return call


def _of(axes: Set[str], spec: PartitionSpec) -> PartitionSpec:
  """Return the spec without other axes."""
  def one(part):
    parts = (part,) if isinstance(part, str) else part or ()
    return tuple(axis for axis in parts if axis in axes) or None

  return PartitionSpec(*map(one, spec))


def mesh_sizes() -> Mapping[str, int]:
  """Return the sizes of the axes of the mesh in force; none where it has one device."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return sizes if any(sizes.get(axis, 1) > 1 for axis in AXES) else {}


def _placed(x: jax.Array, kind: str, sizes: Mapping[str, int]) -> PartitionSpec:
  return fitted(ACTIVATIONS[kind], x.shape, sizes)
