"Which module of a package imports which, read from its files; nothing is imported."
import ast


def module_name(path, root):
    "Dotted name of a file of the package."
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def targets(node, package):
    "Dotted names that a statement may import, inside functions as well, by string as well."
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        stem = ".".join([*above, *([node.module] if node.module else [])])
        return [stem, *(f"{stem}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("hkust_demos."):
        return [node.value]
    return []


def arrows(root):
    "Which module of a package imports which."
    paths = {module_name(path, root): path for path in root.rglob("*.py") if path.name != "_modidx.py"}
    found = {}
    for name, path in paths.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        named = {target for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for target in targets(node, package)}
        found[name] = (named & set(paths)) - {name}
    return found
