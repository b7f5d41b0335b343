"""Walk our source and hold every use of TensorRT and CUDA against descriptions of the real bindings.

Types are followed as far as the checks need: annotations, constructors, results of described methods, items
of annotated dictionaries. Where the type of an object is not known and an attribute of it has the name of one
of TensorRT's, the walk asks for an annotation, so that nothing goes by unchecked.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOTS = {"trt": "tensorrt", "cudart": "cuda"}
"""What the modules are called in our source."""


def mismatch(overloads: list[dict], positional: int, keywords: list[str]) -> str | None:
    """Why no overload takes these arguments, or None."""
    reasons = []
    for overload in overloads:
        names, optional = overload["parameters"], overload["optional"]
        unknown = [keyword for keyword in keywords if keyword not in names[positional:]]
        required = [name for name in names[positional:] if name not in keywords and name not in optional]
        if positional > len(names):
            reasons.append(f"takes {len(names)} arguments, given {positional}")
        elif unknown:
            reasons.append(f"has no parameter {unknown[0]!r} here; it has {', '.join(names)}")
        elif required:
            reasons.append(f"needs {', '.join(required)}")
        else:
            return None
    return "; ".join(reasons) or "has no signature"


@dataclass(frozen=True)
class Described:
    """A thing of a binding: a module, a class, an instance, or something callable."""

    kind: str
    module: str
    name: str
    entry: Any


@dataclass(frozen=True)
class Many:
    """A dictionary or sequence of described instances."""

    item: Described


@dataclass
class Walk:
    """One source file against one description per module.

    Attributes:
        faults: what does not fit, with file and line.
        used: names that were found and fit.
    """

    path: Path
    descriptions: dict[str, dict]
    faults: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.path.read_text(encoding="utf-8"))
        classes = [entry for found in self.descriptions.values() for entry in found["classes"].values()]
        self.telling = {
            name
            for entry in classes
            for name in (*entry.get("methods", ()), *entry.get("properties", ()))
            if "_" in name.strip("_")
        }
        self.returns = {
            node.name: node.returns for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)
        }
        self.own = {
            node.name for node in ast.walk(self.tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        self.fields: dict[str, Any] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.AnnAssign) and _is_self(node.target):
                self.fields[node.target.attr] = self.annotated(node.annotation)
        self.block(self.tree.body, {})

    def fault(self, node: ast.AST, text: str) -> None:
        self.faults.append(f"{self.path.name}:{node.lineno}: {text}")

    # statements

    def block(self, body: list[ast.stmt], scope: dict[str, Any]) -> None:
        for statement in body:
            self.statement(statement, scope)

    def statement(self, node: ast.stmt, scope: dict[str, Any]) -> None:
        if isinstance(node, ast.FunctionDef):
            inner = dict(scope)
            for argument in (*node.args.args, *node.args.kwonlyargs):
                inner[argument.arg] = self.annotated(argument.annotation)
            for default in (*node.args.defaults, *(item for item in node.args.kw_defaults if item)):
                self.infer(default, scope)
            self.block(node.body, inner)
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                self.subclass(node, self.infer(base, scope))
            self.block(node.body, dict(scope))
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.infer(node.value, scope)
            self.assign(node.target, self.annotated(node.annotation), scope)
        elif isinstance(node, ast.Assign):
            found = self.infer(node.value, scope)
            for target in node.targets:
                self.assign(target, found, scope)
        elif isinstance(node, ast.For):
            found = self.infer(node.iter, scope)
            self.assign(node.target, found.item if isinstance(found, Many) else None, scope)
            self.block(node.body + node.orelse, scope)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    self.statement(child, scope)
                elif isinstance(child, ast.expr):
                    self.infer(child, scope)
                elif isinstance(child, (ast.withitem, ast.ExceptHandler)):
                    self.statement(child, scope)  # type: ignore[arg-type]

    def assign(self, target: ast.expr, found: Any, scope: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            scope[target.id] = found
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self.assign(part, None, scope)
        else:
            self.infer(target, scope)

    def subclass(self, node: ast.ClassDef, base: Any) -> None:
        """Methods that override are called by the library: they have the base's parameters."""
        if not isinstance(base, Described):
            return
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("__"):
                overloads = base.entry["methods"].get(method.name)
                given = [argument.arg for argument in method.args.args[1:]]
                if overloads is None:
                    self.fault(method, f"{base.name} has no method {method.name} to override")
                elif given not in [overload["parameters"] for overload in overloads]:
                    self.fault(method, f"{base.name}.{method.name} has other parameters than {given}")
                else:
                    self.used.add(f"{base.name}.{method.name}")

    # expressions

    def annotated(self, node: ast.expr | None) -> Any:
        """What an annotation says, if it names a described class."""
        if isinstance(node, ast.BinOp):
            return self.annotated(node.left) or self.annotated(node.right)
        if isinstance(node, ast.Subscript):
            inner = node.slice.elts[-1] if isinstance(node.slice, ast.Tuple) else node.slice
            item = self.annotated(inner)
            return Many(item) if isinstance(item, Described) else None
        if isinstance(node, ast.Attribute):
            found = self.infer(node, {})
            return Described("instance", found.module, found.name, found.entry) if found else None
        return None

    def infer(self, node: ast.expr | None, scope: dict[str, Any]) -> Any:
        """What an expression is; faults on the way are noted."""
        if isinstance(node, ast.Name):
            if node.id in ROOTS:
                module = ROOTS[node.id]
                return Described("module", module, node.id, self.descriptions[module])
            return scope.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.attribute(node, scope)
        if isinstance(node, ast.Call):
            return self.call(node, scope)
        if isinstance(node, ast.Subscript):
            found = self.infer(node.value, scope)
            self.infer(node.slice, scope)
            return found.item if isinstance(found, Many) else None
        if isinstance(node, (ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)):
            inner = dict(scope)
            for part in node.generators:
                found = self.infer(part.iter, inner)
                self.assign(part.target, found.item if isinstance(found, Many) else None, inner)
                for condition in part.ifs:
                    self.infer(condition, inner)
            for result in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
                self.infer(result, inner)
            return None
        if isinstance(node, ast.Lambda):
            self.infer(node.body, scope)
            return None
        for child in ast.iter_child_nodes(node) if node is not None else ():
            if isinstance(child, ast.expr):
                self.infer(child, scope)
        return None

    def attribute(self, node: ast.Attribute, scope: dict[str, Any]) -> Any:
        base = self.infer(node.value, scope)
        if _is_self(node):
            return self.fields.get(node.attr)
        if isinstance(base, Many):
            return base if node.attr == "values" else None
        if not isinstance(base, Described):
            if node.attr in self.telling and node.attr not in self.own:
                self.fault(node, f"what has .{node.attr} here? Annotate it, so that it can be checked")
            return None
        where = f"{base.name}.{node.attr}"
        entry = base.entry
        for kind, table in (("class", "classes"), ("call", "functions"), ("call", "methods")):
            if node.attr in entry.get(table, {}):
                self.used.add(where)
                name = node.attr if kind == "class" else where
                return Described(kind, base.module, name, entry[table][node.attr])
        known = (*entry.get("enum", ()), *entry.get("constants", ()), *entry.get("properties", ()))
        if node.attr in known:
            self.used.add(where)
        else:
            self.fault(node, f"{self.descriptions[base.module]['version']} has no {where}")
        return None

    def call(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        function = self.infer(node.func, scope)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.infer(argument.value if isinstance(argument, ast.Starred) else argument, scope)
        if isinstance(function, Many):
            return function
        if not isinstance(function, Described):
            returns = self.returns.get(node.func.id) if isinstance(node.func, ast.Name) else None
            return self.annotated(returns)
        if function.kind == "class":
            overloads, result = function.entry.get("methods", {}).get("__init__", []), function.name
        else:
            overloads, result = function.entry, function.entry[0]["returns"] if function.entry else ""
        positional = len(node.args)
        if function.name.endswith(".__init__") and positional:
            positional -= 1  # self
        if overloads:
            why = mismatch(overloads, positional, [keyword.arg or "**" for keyword in node.keywords])
            if why:
                version = self.descriptions[function.module]["version"]
                self.fault(node, f"{version}: {function.name} {why}")
        classes = self.descriptions[function.module]["classes"]
        entry = classes.get(result)
        return Described("instance", function.module, result, entry) if entry else None


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
