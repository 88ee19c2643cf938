"""How the council's repository is fetched: from the registrar over HTTPS, or from a folder.

Rules
- python-tuf's `Updater` decides what is fetched and verifies it; a fetcher only brings bytes, and believes none.
- Every fetch is bounded in bytes and in time, whatever the metadata claims about lengths, and all fetches of one check
  share one deadline: neither endless nor trickling data holds a check up.
- HTTPS trusts the network's own authority alone and checks the registrar's name whatever the address is. No redirect is
  followed, no compression accepted, no proxy of the environment used.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import httpx
from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError, SlowRetrievalError
from tuf.ngclient import FetcherInterface

from fallow.domain.errors import CharterInvalid, CharterUnavailable
from fallow.domain.network import REGISTRAR_NAME
from fallow.trust.certificates import client_context
from fallow.trust.council import tuf_format as tuf

BASE = "repository:///"
"""Stands for the repository's folder, wherever it is. What a fetcher is asked for begins with it."""
FETCH_MAX_BYTES = tuf.FILE_MAX_BYTES
CHECK_TIMEOUT_S = 20.0
"""For everything that one check fetches."""
READ_TIMEOUT_S = 5.0
"""For one wait: to connect, or for the next bytes."""
URLS_MAX = 8
_PIECE_BYTES = 64 * 1024


class RepositoryFetcher(Protocol):
    """What `CharterClient` and `read_base` fetch with."""

    def start(self) -> None:
        """A check begins: its time runs from here."""
        ...

    def get(self, path: str, max_bytes: int) -> bytes | None:
        """A file of the repository, such as `halts.bin`; `None` when there is none.

        Raises `CharterUnavailable`, `CharterInvalid` when it is too long.
        """
        ...

    @property
    def tuf(self) -> FetcherInterface:
        """The same, for python-tuf."""
        ...


class _Fetcher(FetcherInterface):
    """What both fetchers share."""

    def start(self) -> None:
        """A check begins."""

    @property
    def tuf(self) -> FetcherInterface:
        return self

    def get(self, path: str, max_bytes: int) -> bytes | None:
        try:
            return bytes(self.download_bytes(BASE + path, max_bytes))
        except DownloadHTTPError as error:
            if error.status_code in {403, 404}:
                return None
            raise CharterUnavailable(f"the council's repository cannot be fetched: {error}") from None
        except DownloadLengthMismatchError as error:
            raise CharterInvalid(f"{path} is longer than it can be: {error}") from None
        except DownloadError as error:
            raise CharterUnavailable(f"the council's repository cannot be fetched: {error}") from None


class FolderFetcher(_Fetcher):
    """The repository in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = self._folder / url.removeprefix(BASE)
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise DownloadHTTPError(f"{url} is outside of the repository", 403)
        try:
            with path.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise DownloadHTTPError(f"there is no {path.name}", 404) from None
        except OSError as error:
            raise DownloadError(f"{path.name} cannot be read: {error.strerror}") from None


class HttpFetcher(_Fetcher):
    """The repository behind one or more registrar addresses. Keeps its connection open; close it when done."""

    def __init__(
        self,
        urls: Sequence[str] | Callable[[], Sequence[str]],
        authority_pem: str,
        check_timeout_s: float = CHECK_TIMEOUT_S,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        """`urls`: where the repository's folder is served, such as `https://localhost:7443/tuf/`; tried in order. Given
        as a function, each check asks it anew."""
        self._given = urls
        self._urls = self._places()
        self._check_timeout_s = check_timeout_s
        self._deadline_s = time.monotonic() + check_timeout_s
        self._client = httpx.Client(
            verify=client_context(authority_pem),
            timeout=read_timeout_s,
            trust_env=False,
            follow_redirects=False,
            headers={"accept-encoding": "identity"},
        )

    def start(self) -> None:
        self._deadline_s = time.monotonic() + self._check_timeout_s
        self._urls = self._places()

    def close(self) -> None:
        self._client.close()

    def _places(self) -> list[str]:
        now = self._given() if callable(self._given) else self._given
        return [url if url.endswith("/") else url + "/" for url in now[:URLS_MAX]]

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = url.removeprefix(BASE)
        last: Exception | None = None
        for base in self._urls:
            self._check_time(url)
            try:
                yield from self._bytes_of(base + path)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:  # nothing came: the next address may do
                last = error
            except httpx.TimeoutException:
                raise SlowRetrievalError(f"{path} did not come in time") from None
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise DownloadError(f"{path} did not come: {error}") from None
            else:
                return
        raise DownloadError(f"no registrar can be reached at {', '.join(self._urls) or 'no address'}: {last}")

    def _bytes_of(self, url: str) -> Iterator[bytes]:
        received = 0
        with self._client.stream("GET", url, extensions={"sni_hostname": REGISTRAR_NAME}) as response:
            if response.status_code != httpx.codes.OK:
                raise DownloadHTTPError(f"the registrar answered {response.status_code}", response.status_code)
            for piece in response.iter_raw():
                received += len(piece)
                if received > FETCH_MAX_BYTES:
                    raise DownloadLengthMismatchError(f"more than {FETCH_MAX_BYTES} bytes came")
                self._check_time(url)
                yield piece

    def _check_time(self, url: str) -> None:
        if time.monotonic() > self._deadline_s:
            raise SlowRetrievalError(f"{url} did not come within the {self._check_timeout_s:g} s that a check may take")
