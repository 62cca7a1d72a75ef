"""Knowledge about a family of models is in its adapter alone: the rule, read from the source files.

Outside of `students/families`, the registry and `world` (which builds tiny models of families) no module

- imports a family's module, here or in transformers;
- has a family's `model_type` as a text in code, or the name of one of its classes;
- compares `model_type` with a text, or looks something up by it;
- uses an attribute, argument or setting that only some families' models have (`OF_SOME_FAMILIES`).

Docstrings and comments may name families, as examples.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lavender
from lavender.students.registry import FAMILIES

SOURCE = Path(lavender.__file__).parent
FAMILY_FILES = sorted((SOURCE / "students" / "families").glob("*.py"))
MODULES = {path.stem for path in FAMILY_FILES} - {"__init__"} | {"families"}
MODEL_TYPES = set(FAMILIES)
CLASSES = {
    node.name
    for path in FAMILY_FILES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ClassDef)
}
OF_SOME_FAMILIES = {
    "aspect_ratio_ids",
    "cross_layer_interval",
    "deepstack_visual_embeds",
    "get_vllm_embedding",
    "image_attention_mask",
    "image_bound",
    "image_grid_pinpoints",
    "image_grid_thw",
    "image_token_index",
    "k_layer_norm",
    "max_num_tiles",
    "mm_tokens_per_image",
    "num_additional_embeddings",
    "perceiver_config",
    "perceiver_latents",
    "q_layer_norm",
    "query_num",
    "resampler_n_latents",
    "spatial_merge_size",
    "tgt_sizes",
    "use_resampler",
    "vision_feature_select_strategy",
}
ALLOWED = (SOURCE / "students" / "families", SOURCE / "students" / "registry.py", SOURCE / "world")


def docstrings(tree: ast.AST) -> set[int]:
    """Ids of the texts that stand alone as a statement: docstrings, also those of attributes."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def imported(node: ast.AST) -> Iterator[str]:
    """Parts of the modules' names that an import names."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from alias.name.split(".")
    elif isinstance(node, ast.ImportFrom):
        yield from (node.module or "").split(".")


def asks_model_type(node: ast.AST) -> bool:
    """Whether an expression is `x.model_type`, `x["model_type"]` or `x.get("model_type")`."""
    if isinstance(node, ast.Attribute):
        return node.attr == "model_type"
    texts = [node.slice] if isinstance(node, ast.Subscript) else node.args if isinstance(node, ast.Call) else []
    return any(isinstance(text, ast.Constant) and text.value == "model_type" for text in texts)


def decides_by_model_type(node: ast.AST) -> bool:
    """Whether a node compares a model type with texts, or takes it as a key."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        texts = [one for side in sides for one in ast.walk(side) if isinstance(one, ast.Constant)]
        is_text = any(isinstance(text.value, str) and text.value != "model_type" for text in texts)
        return is_text and any(asks_model_type(side) for side in sides)
    if isinstance(node, ast.Subscript):
        return asks_model_type(node.slice)
    is_get = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get"
    return is_get and any(asks_model_type(argument) for argument in node.args)


def knowledge(source: str) -> list[str]:
    """What a source file knows about families, each with its line."""
    tree = ast.parse(source)
    prose, found = docstrings(tree), []
    for node in ast.walk(tree):
        names = {part for part in imported(node) if part in MODULES | MODEL_TYPES}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            names |= {node.value} & (MODEL_TYPES | CLASSES | OF_SOME_FAMILIES)
        if isinstance(node, ast.Attribute):
            names |= {node.attr} & (CLASSES | OF_SOME_FAMILIES)
        if isinstance(node, ast.Name | ast.alias):
            names |= {node.id if isinstance(node, ast.Name) else node.name} & CLASSES
        if isinstance(node, ast.keyword | ast.arg):
            names |= {node.arg or ""} & OF_SOME_FAMILIES
        if decides_by_model_type(node):
            names.add("model_type")
        found += [f"line {getattr(node, 'lineno', '?')}: {name}" for name in sorted(names)]
    return found


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted(SOURCE.rglob("*.py"))
        if not any(path == allowed or allowed in path.parents for allowed in ALLOWED)
    ],
    ids=lambda path: path.relative_to(SOURCE).as_posix(),
)
def test_nothing_else_knows_families(path):
    assert knowledge(path.read_text()) == []


@pytest.mark.parametrize(
    "code",
    [
        "import lavender.students.families.mllama",
        "from lavender.students.families.llava import x",
        "from transformers.models.idefics import x",
        "from lavender.students.families import something",
        "from x import MllamaAdapter",
        "name = 'qwen2_vl'",
        "if config.model_type == 'something': pass",
        "if config.model_type in ('a', 'b'): pass",
        "if raw['model_type'] == 'a': pass",
        "TABLE[config.model_type]",
        "TABLE.get(config.model_type)",
        "getattr(table, 'num_additional_embeddings', 0)",
        "config.vision_config.max_num_tiles",
        "model(tgt_sizes=sizes)",
        "kwargs['deepstack_visual_embeds']",
    ],
)
def test_the_rule_finds_knowledge(code):
    assert knowledge(code)


@pytest.mark.parametrize(
    "code",
    [
        '"""As in Mllama: mllama."""',
        'X = 1\n"""mllama"""',
        "# mllama",
        "facts = {'family': adapter.model_type}",
        "raise E(f'a model of type {config.model_type!r}')",
        "if raw.get('model_type') not in CONFIG_MAPPING: pass",
    ],
)
def test_the_rule_lets_the_rest_pass(code):
    assert knowledge(code) == []


def test_the_names_are_of_families():
    """A name that no family uses any more protects nothing."""
    source = "".join(path.read_text() for path in FAMILY_FILES)
    assert [name for name in OF_SOME_FAMILIES if name not in source] == []
