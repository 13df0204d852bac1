"""The page, in a browser, on a running server with the engine behind it."""

import shutil
import threading
import time
from types import SimpleNamespace

import pytest

import configs
from serving.api import Server, create_app, listen
from serving.engine import Engine
from serving.served import Served, load

pytestmark = [pytest.mark.browser, pytest.mark.slow]

KEY = "a key"
MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no Chromium here: install chromium to test the page")
    with (
        api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox"]) as browser,
    ):
        yield browser


@pytest.fixture(scope="module")
def served(fine_tuned) -> Served:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(fine_tuned.runs))
        return load(configs.load(fine_tuned.config))


@pytest.fixture
def site(request, served, monkeypatch):
    """The server. pace: the seconds that a token takes at least. A parameter: the key it asks for."""
    monkeypatch.setattr(Served, "stop", ())  # only its length ends an answer
    with Engine(served.model, served.tokenizer) as engine:
        site = SimpleNamespace(engine=engine, pace=0.0)
        step = engine.decoder.step

        def paced():
            time.sleep(site.pace)
            return step()

        monkeypatch.setattr(engine.decoder, "step", paced)
        running = Server(create_app(served, engine, getattr(request, "param", None)), engine)
        listening = listen("127.0.0.1", 0)
        site.url = "http://{}:{}/".format(*listening.getsockname())
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        yield site
        running.should_exit = True
        thread.join()


@pytest.fixture
def page(browser, site):
    """The page, opened. asked: the messages of each request. At the end, nothing may have gone wrong in it."""
    page = browser.new_page()
    page.set_default_timeout(10_000)
    page.asked, wrong = [], []
    page.on("request", lambda request: request.method == "POST" and page.asked.append(request.post_data_json))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on(
        "console",
        # What the browser says of a status like 401 is no error of the page's.
        lambda said: (
            said.type in ("error", "warning")
            and not said.text.startswith("Failed to load resource")
            and wrong.append(said.text)
        ),
    )
    page.goto(site.url)
    yield page
    page.close()
    assert not wrong


def settings(page, **values) -> None:
    page.get_by_text("Settings", exact=True).click()
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))
    page.keyboard.press("Escape")


def button(page, name: str):
    return page.get_by_role("button", name=name, exact=True)


def answers(page) -> list[str]:
    return page.locator(".assistant .said").all_inner_texts()


def send(page, text: str) -> str:
    """The answer to a message."""
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")
    return finished(page)


def finished(page) -> str:
    """The last answer, once it is whole."""
    page.locator(".assistant .note", has_text="tokens/s").last.wait_for()
    page.locator("#send", has_text="Send").wait_for()
    return answers(page)[-1]


def wait(true) -> None:
    until = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_chat(page, site):
    page.get_by_role("heading", name="mini-sft").wait_for()
    settings(page, max_tokens=8, seed=1)
    first = send(page, MARKUP)
    assert first
    assert page.locator(".user .said").all_inner_texts() == [MARKUP]
    assert page.locator("img").count() == 0
    assert page.locator("[aria-live]").inner_text() == first
    page.reload()
    assert answers(page) == [first]
    button(page, "Regenerate").click()
    assert finished(page) != first
    assert [body["seed"] for body in page.asked] == [1, 2]
    assert len(answers(page)) == 1
    button(page, "New chat").click()
    assert page.locator("article").count() == 0
    page.reload()
    assert page.locator("article").count() == 0
    settings(page, temperature=0, seed="")
    same = send(page, "Say a.")
    button(page, "Regenerate").click()
    assert finished(page) == same
    assert (page.asked[-1]["temperature"], page.asked[-1]["max_tokens"]) == (0, 8)
    settings(page, temperature=7)
    button(page, "Regenerate").click()
    assert page.locator("#temperature").is_visible()
    assert page.evaluate("document.activeElement.id") == "temperature"
    assert len(page.asked) == 4


@pytest.mark.parametrize("stop", ["Stop", "Escape"])
def test_stop(page, site, stop):
    site.pace = 0.1
    page.get_by_label("Your message").fill("Say a.")
    page.get_by_label("Your message").press("Enter")
    wait(lambda: answers(page) and answers(page)[0])
    [generation] = site.engine.open.values()
    at = generation.tokens
    if stop == "Stop":
        button(page, "Stop").click()
    else:
        page.keyboard.press("Escape")
    wait(lambda: not site.engine.open)
    assert generation.tokens <= at + 3
    page.locator(".assistant .note", has_text="stopped").wait_for()
    [said] = answers(page)
    assert generation.writer.tokenizer.decode(generation.text.ids[generation.prompt_tokens :]).startswith(said.strip())
    page.reload()
    assert answers(page) == [said]


def test_long_talk(page):
    """What has no room in the context is left out: first of all what is oldest. Alone too long, it is given back."""
    settings(page, max_tokens=4)
    sent = ["Say a.", "Say in.", "Say on.", "Say to.", "Say if.", "Say of."]
    for text in sent:
        send(page, text)
    contents = [[message["content"] for message in body["messages"]] for body in page.asked]
    assert contents[1][0] == sent[0]
    assert contents[-1][-1] == sent[-1]
    assert sent[0] not in contents[-1]
    assert page.locator(".edge:visible").count() == 1
    assert len(answers(page)) == len(sent)
    page.get_by_label("Your message").fill("a " * 100)
    page.get_by_label("Your message").press("Enter")
    page.get_by_role("status").filter(has_text="the model sees 64").wait_for()
    assert page.get_by_label("Your message").input_value() == "a " * 100
    assert len(answers(page)) == len(sent)


@pytest.mark.parametrize("site", [KEY], indirect=True)
def test_key(page):
    page.get_by_role("status").filter(has_text="asks for an API key").wait_for()
    page.get_by_label("API key").fill("another")
    page.keyboard.press("Enter")
    page.get_by_role("status").filter(has_text="does not take this key").wait_for()
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="mini-sft").wait_for()
    assert send(page, "Say a.")
    page.evaluate("key = 'lost'")
    page.get_by_label("Your message").fill("Say in.")
    page.get_by_label("Your message").press("Enter")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    assert finished(page)
    assert len(answers(page)) == 2


def test_broken_connection(page):
    """An answer that does not come can be asked for again."""
    page.get_by_role("heading", name="mini-sft").wait_for()
    page.route("**/v1/**", lambda route: route.abort())
    page.get_by_label("Your message").fill("Say a.")
    page.get_by_label("Your message").press("Enter")
    page.get_by_role("status").filter(has_text="cannot be reached").wait_for()
    page.unroute("**/v1/**")
    button(page, "Try again").click()
    assert finished(page)
    assert len(answers(page)) == 1
