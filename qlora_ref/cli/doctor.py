"""`qlora-ref doctor`."""

from __future__ import annotations

from qlora_ref.cli.options import AsJson, console, print_json


def doctor(as_json: AsJson = False) -> None:
    """What was found on this machine, which backend serves each operation and why."""
    from qlora_ref.doctor import diagnose

    facts = diagnose()
    if as_json:
        return print_json(facts)
    for section in ("machine", "packages", "tools"):
        console.print(f"[bold]{section}[/bold]")
        for name, value in facts[section].items():
            console.print(f"  {name:<14} {value}", highlight=False)
    for device, operations in facts["operations"].items():
        console.print(f"[bold]operations on {device}[/bold]")
        for name, found in operations.items():
            others = [f"{b}: {why}" for b, why in found["reasons"].items() if b != found["backend"]]
            console.print(
                f"  {name:<16} {found['backend']}  ({'; '.join(others)})", highlight=False
            )
    for line in facts["advice"]:
        console.print(f"[yellow]advice[/yellow] {line}", highlight=False)
