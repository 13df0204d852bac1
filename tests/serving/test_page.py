"""The page in a browser, on a running server."""

import shutil

import pytest

from tests.serving.conftest import Server, serve, slow, until

pytestmark = [pytest.mark.browser, pytest.mark.slow]

KEY, MARKUP = "a key", "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
    paths = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not paths:
        pytest.skip("no Chromium here: install chromium to test the page")
    with playwright.sync_playwright() as p, p.chromium.launch(executable_path=paths[0], args=["--no-sandbox"]) as b:
        yield b


@pytest.fixture
def site(request, endless):
    """The server. Only the length ends its answers. Parameter: the key that it asks for."""
    with serve(endless, key=getattr(request, "param", None)) as server:
        yield server


@pytest.fixture
def page(browser, site):
    """The page. asked: the body of each request. At the end, nothing may have gone wrong in it."""
    page = browser.new_page()
    page.set_default_timeout(10_000)
    page.asked, wrong = [], []
    page.on("request", lambda request: request.method == "POST" and page.asked.append(request.post_data_json))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.goto(site.url)
    yield page
    page.close()
    assert not wrong


def settings(page, **values) -> None:
    page.get_by_text("Settings").click()
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_text("Settings").click()


def button(page, name: str):
    return page.get_by_role("button", name=name, exact=True)


def answers(page) -> list[str]:
    return page.locator(".assistant .said").all_inner_texts()


def write(page, text: str) -> None:
    page.get_by_label("Your message").press_sequentially(text)
    page.get_by_label("Your message").press("Enter")


def finished(page) -> str:
    """The last answer, when it is complete."""
    button(page, "Send").wait_for()
    page.locator("article:last-child .note", has_text="tokens/s").wait_for()
    return answers(page)[-1]


def send(page, text: str) -> str:
    write(page, text)
    return finished(page)


def test_chat_and_regenerate(page):
    page.get_by_role("heading", name="mini-sft").wait_for()
    settings(page, max_tokens=8, seed=1)
    first = send(page, MARKUP)
    assert first
    assert page.locator(".user .said").all_inner_texts() == [MARKUP]
    assert page.locator("img").count() == 0
    button(page, "Regenerate").click()
    assert finished(page) != first
    assert [body["seed"] for body in page.asked] == [1, 2]
    assert len(answers(page)) == 1
    button(page, "New chat").click()
    assert page.locator("article").count() == 0
    settings(page, temperature=0, seed="", system="Be brief.")
    same = send(page, "Say a.")
    button(page, "Regenerate").click()
    assert finished(page) == same
    assert (page.asked[-1]["temperature"], page.asked[-1]["max_tokens"]) == (0, 8)
    assert [message["role"] for message in page.asked[-1]["messages"]] == ["system", "user"]
    settings(page, temperature=7)
    button(page, "Regenerate").click()
    page.get_by_role("status").filter(has_text="temperature").wait_for()
    assert page.locator("#temperature").is_visible()


@pytest.mark.parametrize("stop", ["Stop", "Escape"])
def test_stop(page, site: Server, stop):
    slow(site.engine, 0.1)
    write(page, "Say a.")
    until(lambda: answers(page) and answers(page)[0])
    [generation] = site.engine.open.values()
    before = len(generation.tokens)
    page.keyboard.press("Escape") if stop == "Escape" else button(page, "Stop").click()
    until(lambda: not site.engine.open)
    assert len(generation.tokens) <= before + 3
    page.locator(".note", has_text="stopped").wait_for()
    [text] = answers(page)
    assert generation.text.strip().startswith(text.strip())


def test_a_conversation_longer_than_the_context(page):
    """The oldest messages are left out. A message that is too long goes back to the text field."""
    settings(page, max_tokens=4)
    sent = ["Say a.", "Say in.", "Say on.", "Say to.", "Say if.", "Say of."]
    for text in sent:
        send(page, text)
    contents = [[message["content"] for message in body["messages"]] for body in page.asked]
    assert contents[1][0] == sent[0]
    assert contents[-1][-1] == sent[-1]
    assert sent[0] not in contents[-1]
    assert page.get_by_text("no longer sees").first.is_visible()
    write(page, "a " * 100)
    page.get_by_role("status").filter(has_text="context of 64").wait_for()
    assert page.get_by_label("Your message").input_value() == "a " * 100
    assert len(answers(page)) == len(sent)


@pytest.mark.parametrize("site", [KEY], indirect=True)
def test_key(page):
    page.get_by_role("status").filter(has_text="no API key").wait_for()
    for key in ("another", KEY):
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
    page.get_by_role("heading", name="mini-sft").wait_for()
    assert send(page, "Say a.")
    page.get_by_label("API key").fill("lost")
    write(page, "Say in.")
    page.get_by_role("status").filter(has_text="no API key").wait_for()
    page.get_by_label("API key").fill(KEY)
    button(page, "Regenerate").click()
    assert finished(page)
    assert len(answers(page)) == 2


def test_a_broken_connection(page):
    """The question stays and can be asked again."""
    page.get_by_role("heading", name="mini-sft").wait_for()
    page.route("**/v1/**", lambda route: route.abort())
    write(page, "Say a.")
    page.get_by_role("status").filter(has_text="cannot be reached").wait_for()
    page.unroute("**/v1/**")
    button(page, "Regenerate").click()
    assert finished(page)
    assert len(answers(page)) == 1
