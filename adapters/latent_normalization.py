"""What a pipeline of diffusers does to latents between its autoencoder and its generator, read from its source."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType

from diffusers import DiffusionPipeline, ModularPipeline

# What the attributes and keys that pipelines read stand for. `latents_mean` and "bn" come with a std, `latents_std` and
# `running_var`, which is not looked for; the others are here because sums with them alone are no sums with latents.
SETTINGS = {
    "scaling_factor": "scaling_factor",
    "shift_factor": "shift_factor",
    "latents_mean": "latents_mean",
    "running_mean": "bn",
    "latents_std": "std",
    "running_var": "std",
    "batch_norm_eps": "std",
}
OPERATIONS = {"mul": ast.Mult, "div": ast.Div, "add": ast.Add, "sub": ast.Sub}
INVERSE = "1 / "


@dataclass(frozen=True)
class LatentNormalization:
    """What a pipeline applies to latents.

    Attributes:
        decoding: what it undoes before it decodes: some of `scaling_factor`, `shift_factor`, `latents_mean` (which
            stands for mean and std) and "bn" (batch norm of packed latents).
        encoding: what it applies after it encodes.
        encodes: whether it encodes at all.
        channels: the only number of channels that its mean and std are right for, None if there is none.
        upcast_parts: parts of an autoencoder, such as `post_quant_conv`, that it uses to decode in float32.
        needs_posterior: whether it takes `latent_dist` of all that is encoded, which small autoencoders lack.
    """

    decoding: frozenset[str]
    encoding: frozenset[str]
    encodes: bool
    channels: int | None
    upcast_parts: tuple[str, ...]
    needs_posterior: bool

    @property
    def applied(self) -> frozenset[str]:
        """What holds for all latents. Pipelines that encode conditions alone may leave these without a scale."""
        if not self.encodes:
            return self.decoding
        return self.decoding & (self.encoding | {"scaling_factor"})

    @property
    def has_raw_conditions(self) -> bool:
        """Whether the pipeline gives encoded images to its generator without the scale that generated latents have."""
        return self.encodes and "scaling_factor" in self.decoding - self.encoding


def read_normalization(pipe: DiffusionPipeline | type[DiffusionPipeline] | ModularPipeline) -> LatentNormalization:
    """Reads what a pipeline applies to latents from the source of its class or, if it is modular, of its blocks.

    A number that is added to latents or divides them belongs to decoding; one that is subtracted or multiplies them, to
    encoding. All 140 classes of diffusers 0.42 that take an `AutoencoderKL` keep to that.

    Returns:
        What was found. `decoding` is empty if there is nothing, or if there is no source.
    """
    if isinstance(pipe, ModularPipeline):
        return _read(tuple(dict.fromkeys(_leaves(pipe.blocks))))
    return _read((pipe if isinstance(pipe, type) else type(pipe),))


@cache
def _read(classes: tuple[type, ...]) -> LatentNormalization:
    decoding, encoding, sources = set(), set(), []
    for function in _functions(classes):
        try:
            source = textwrap.dedent(inspect.getsource(function))
            reader = _Reader(ast.parse(source))
        except (OSError, TypeError, SyntaxError):  # compiled, or typed into an interpreter
            continue
        sources.append(source)
        decoding |= reader.decoding
        encoding |= reader.encoding
    text = "\n".join(sources)
    channels = re.search(r"latents_mean\)\.view\(1, (\d+), 1, 1\)", text)
    return LatentNormalization(
        decoding=frozenset(decoding),
        encoding=frozenset(encoding),
        encodes=re.search(r"\bvae\.encode\(|\.encode_to_latents\(", text) is not None,
        channels=int(channels[1]) if channels else None,
        upcast_parts=tuple(part for part in ("post_quant_conv", "decoder.mid_block") if f"vae.{part}" in text),
        needs_posterior=re.search(r"\bvae\.encode\(.*\)\.latent_dist", text) is not None,
    )


def _functions(classes: tuple[type, ...]) -> Iterator[Callable]:
    """The methods of these classes that concern the autoencoder, and the functions of their package that they call."""
    waiting = [inspect.unwrap(method) for owner in classes for method in _methods(owner)]
    seen = set()
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        names = set(_names(function.__code__))
        if "vae" in names or names & SETTINGS.keys():
            yield function
        module = function.__module__ or "no module"
        package = module.rpartition(".")[0] or module
        for called in names & function.__globals__.keys():
            value = function.__globals__[called]
            if isinstance(value, FunctionType) and (value.__module__ or "").startswith(package):
                waiting.append(inspect.unwrap(value))


def _leaves(block) -> Iterator[type]:
    """The classes of the blocks that a block consists of."""
    yield type(block)
    for part in block.sub_blocks.values():
        yield from _leaves(part)


def _methods(owner: type) -> Iterator[FunctionType]:
    for name in dir(owner):
        value = inspect.getattr_static(owner, name)
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if isinstance(value, FunctionType) and value.__module__ != DiffusionPipeline.__module__:
            yield value


def _names(code: CodeType) -> Iterable[str]:
    """The attributes, globals and arguments that a function uses, and its short texts, inner functions included."""
    yield from code.co_names
    yield from code.co_varnames
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


class _WithOperators(ast.NodeTransformer):
    """Writes `a.mul_(b)` as `a * b`."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and len(node.args) == 1:
            operation = OPERATIONS.get(node.func.attr.rstrip("_"))
            if operation is not None:
                return ast.BinOp(node.func.value, operation(), node.args[0])
        return node


class _Reader:
    """Finds the sums and products of latents with the settings of an autoencoder in one function."""

    def __init__(self, tree: ast.AST):
        self.decoding: set[str] = set()
        self.encoding: set[str] = set()
        self.variables: dict[str, set[str]] = {}  # settings that variables hold
        nodes = list(ast.walk(_WithOperators().visit(tree)))
        for _ in range(2):  # a variable may be made of another one, which the walk reaches later
            for node in nodes:
                if isinstance(node, ast.Assign):
                    self._remember(node.targets, node.value)
        for node in nodes:
            if isinstance(node, ast.BinOp):
                self._note(node.op, node.left, node.right)
            elif isinstance(node, ast.AugAssign):
                self._note(node.op, node.target, node.value)

    def _remember(self, targets: list[ast.expr], value: ast.expr) -> None:
        for target in targets:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                for part, part_value in zip(target.elts, value.elts):
                    self._remember([part], part_value)
            elif isinstance(target, (ast.Name, ast.Attribute)) and (settings := self._settings(value)):
                self.variables.setdefault(ast.unparse(target), set()).update(settings)

    def _note(self, operation: ast.operator, left: ast.expr, right: ast.expr) -> None:
        """Notes an operation between latents on one side and settings on the other."""
        on_left, on_right = self._settings(left), self._settings(right)
        if on_left is not None and on_right is not None:
            return
        for setting in (on_left or set()) | (on_right or set()):
            name = setting.removeprefix(INVERSE)
            if name == "scaling_factor":
                divides = isinstance(operation, ast.Div) and bool(on_right)
                if divides or isinstance(operation, ast.Mult):
                    undoes = divides != setting.startswith(INVERSE)
                    (self.decoding if undoes else self.encoding).add(name)
            elif name != "std" and isinstance(operation, ast.Add):
                self.decoding.add(name)
            elif name != "std" and isinstance(operation, ast.Sub) and on_right:
                self.encoding.add(name)

    def _settings(self, value: ast.expr) -> set[str] | None:
        """The settings in an expression of settings and numbers alone; None if there is anything else, as latents."""
        if isinstance(value, ast.Constant):
            return None if isinstance(value.value, str) else set()
        if isinstance(value, ast.UnaryOp):
            return self._settings(value.operand)
        if isinstance(value, ast.BinOp):
            left, right = self._settings(value.left), self._settings(value.right)
            if left is None or right is None:
                return None
            if isinstance(value.op, ast.Div):
                right = {name.removeprefix(INVERSE) if name.startswith(INVERSE) else INVERSE + name for name in right}
            return left | right
        if isinstance(value, ast.Attribute) and value.attr in SETTINGS:
            return {SETTINGS[value.attr]}
        if isinstance(value, (ast.Name, ast.Attribute)):
            name = ast.unparse(value)  # arguments are called what they hold
            return self.variables.get(name, {SETTINGS[name]} if name in SETTINGS else None)
        parts: list[
            ast.expr
        ] = []  # settings go through tensor(...), .view(...), getattr(...), `a or b`, `a if b else c`
        if isinstance(value, ast.IfExp):
            parts = [value.body, value.orelse]
        elif isinstance(value, ast.BoolOp):
            parts = value.values
        elif isinstance(value, ast.Subscript):
            parts = [value.value]
        elif isinstance(value, ast.Call):
            parts = value.args + ([value.func.value] if isinstance(value.func, ast.Attribute) else [])
        names = [part.value for part in parts if isinstance(part, ast.Constant)]
        found = {SETTINGS[name] for name in names if isinstance(name, str) and name in SETTINGS}
        return found.union(*(self._settings(part) or set() for part in parts)) or None
