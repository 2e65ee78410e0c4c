#!/usr/bin/env python3
"""Prints the licences of underpass and of all packages that are compiled into it.

    deploy/licences.py --target x86_64-unknown-linux-gnu > licences
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The names of files with a licence or a notice, without extension and in capitals.
FILES = ("LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE")


def compiled_packages(target):
    """The packages of the binary: those that it depends on, without those of tests and of build scripts."""
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", target]
    metadata = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    pending = [identifier for identifier, package in packages.items() if package["name"] == "underpass" and package["source"] is None]
    found = set()
    while pending:
        identifier = pending.pop()
        if identifier in found:
            continue
        found.add(identifier)
        for dependency in nodes[identifier]["deps"]:
            if any(kind["kind"] is None for kind in dependency["dep_kinds"]):
                pending.append(dependency["pkg"])
    return [packages[identifier] for identifier in found if packages[identifier]["source"]]


def texts(package):
    folder = Path(package["manifest_path"]).parent
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name.upper().startswith(FILES)]
    return [file.read_text(errors="replace").strip() for file in files]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    packages = sorted(compiled_packages(parser.parse_args().target), key=lambda package: (package["name"], package["version"]))
    users, missing = defaultdict(list), []
    for package in packages:
        name = f"{package['name']} {package['version']}"
        found = texts(package)
        if not found:
            missing.append(f"{name}: {package['license']}")
        for text in found:
            users[text].append(name)
    print("underpass is licensed under the Apache License 2.0:\n")
    print((ROOT / "LICENSE").read_text().strip())
    print("\n\nIt contains these packages:\n")
    for package in packages:
        print(f"  {package['name']} {package['version']}: {package['license']}")
    if missing:
        print("\nThese packages contain no licence file. Texts of the same licences are below:\n")
        print("\n".join(f"  {one}" for one in missing))
    for text, names in sorted(users.items(), key=lambda entry: entry[1][0]):
        print(f"\n\n{'=' * 80}\n{', '.join(names)}\n{'=' * 80}\n\n{text}")
    print(f"{len(packages)} packages, {len(users)} texts, {len(missing)} packages without one", file=sys.stderr)


if __name__ == "__main__":
    main()
