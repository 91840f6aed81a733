"""Open a page in headless Chromium: ``python -m tests.recipes.chromium page.html`` prints what is there as JSON.

Chromium is the one that Qt's web engine brings along, so that nothing need be installed beside Python packages.
"""

from __future__ import annotations

import json
import sys

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInfo, QWebEngineUrlRequestInterceptor
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

MOST_SECONDS, WINDOW = 60, (1200, 900)
LOOK = """JSON.stringify({
    title: document.title, text: document.body.innerText, tables: document.querySelectorAll("table").length,
    pictures: [...document.images].map(image => [image.naturalWidth, image.getBoundingClientRect().width]),
    size: [document.documentElement.scrollWidth, document.documentElement.scrollHeight, window.innerWidth]})"""


class Requests(QWebEngineUrlRequestInterceptor):
    """Every address that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def interceptRequest(self, info: QWebEngineUrlRequestInfo) -> None:
        self.asked.append(info.requestUrl().toString())


class Page(QWebEnginePage):
    """Keeps what the console is told."""

    def __init__(self, profile: QWebEngineProfile) -> None:
        super().__init__(profile)
        self.said: list[str] = []

    def javaScriptConsoleMessage(self, level: object, message: str, line: int, source: str) -> None:
        self.said.append(message)


def main(path: str) -> int:
    """3 if the page has not been loaded within a minute."""
    application, profile, requests = QApplication(sys.argv[:1]), QWebEngineProfile(), Requests()
    profile.setUrlRequestInterceptor(requests)
    page, view = Page(profile), QWebEngineView()
    view.setPage(page)
    view.resize(*WINDOW)
    view.show()

    def tell(found: str) -> None:
        print(json.dumps({"requests": requests.asked, "console": page.said, **json.loads(found)}), flush=True)
        application.exit(0)

    page.loadFinished.connect(lambda loaded: page.runJavaScript(LOOK, 0, tell) if loaded else application.exit(1))
    page.load(QUrl.fromLocalFile(path))
    QTimer.singleShot(1000 * MOST_SECONDS, lambda: application.exit(3))
    code = application.exec()
    for held in (view, page):  # in front of its profile
        held.deleteLater()
    application.processEvents()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
