"""The list of pages at the side: all rooms, and the topics of the room that is open.

Sphinx would make a tree of all pages anew for each page, which takes most of a build and of the
pages' size.
"""

from collections.abc import Callable
from html import escape

from sphinx.environment import BuildEnvironment

from jaxref_docs.site import Site, title


def navigation(
    site: Site, page: str, address: Callable[[str], str], environment: BuildEnvironment
) -> str:
    """The lists in the form that themes take a table of contents in."""

    def link(target: str, text: str, level: int, inside: str = "") -> str:
        here = target == page or page.startswith(f"{target}/")
        kind = f"toctree-l{level}{' current' if here else ''}{' current-page' * (target == page)}"
        anchor = f'<a class="reference internal" href="{address(target)}">{escape(text)}</a>'
        return f'<li class="{kind}">{anchor}{inside}</li>'

    rooms = []
    for room in site.rooms:
        topics = ""
        if site.is_split(room) and f"{page}/".startswith(f"{site.page(room)}/"):
            links = (link(site.page(room, t), title(room, t), 2) for t in room.topics)
            topics = f"<ul>{''.join(links)}</ul>"
        rooms.append(link(site.page(room), f"jaxref.{room.name}", 1, topics))
    others = [
        link(target, environment.titles[target].astext(), 1)
        for target in ("papers", "tutorials", "benchmarks")
    ]
    return "".join(
        f'<p class="caption" role="heading"><span class="caption-text">{caption}</span></p>'
        f"<ul>{''.join(links)}</ul>"
        for caption, links in (("Rooms", rooms), ("And", others))
    )
