"""``python -m tests.documentation``: rewrite the generated parts of every README."""

from tests.documentation.documents import DOCUMENTS
from tests.documentation.generated import regenerated

if __name__ == "__main__":
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        new = regenerated(text)
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(f"rewrote {path.name} of {path.parent.name}")
