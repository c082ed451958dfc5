"""The routes by which adapters are published, seen, changed and removed while requests run."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse, Response

from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.adapters.published import Published
from sharelora_serve.adapters.registry import AdapterRegistry
from sharelora_serve.adapters.unpack import unpack
from sharelora_serve.config import ServeConfig
from sharelora_serve.errors import (
    AdapterExistsError,
    InvalidRequestError,
    ModelNotFoundError,
    StorageError,
)
from sharelora_serve.priority import lower_priority
from sharelora_serve.server.ascii_json import AsciiJSONResponse
from sharelora_serve.server.body import parse_body, read_body
from sharelora_serve.server.caller import Caller, require_admin
from sharelora_serve.server.document import IF_MATCH, takes_form, takes_json
from sharelora_serve.server.drain import Drain
from sharelora_serve.server.errors import BodyError, Problem
from sharelora_serve.server.generation import GenerationContext
from sharelora_serve.server.logs import request_fields
from sharelora_serve.server.permissions import changeable, creatable, unknown_adapter, visible
from sharelora_serve.server.upload import AdapterForm, Receiver, Upload, VersionForm

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# Publications that are checked and stored at the same time, changes of names and reads likewise;
# and how much of the processor publications leave to the requests that run.
_NUM_WORKERS = 2
_NICENESS = 5


class _Fields(BaseModel):
    """A JSON body of these routes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def disagreements(self) -> list[Problem]:
        """No two of the fields can disagree."""
        return []


class RollbackFields(_Fields):
    """Which version to serve again: its digest or the beginning of it; null is the one before."""

    version: str | None = None


class LoadFields(_Fields):
    """vLLM's request to load an adapter from the adapters folder."""

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False


class UnloadFields(_Fields):
    """vLLM's request to unload an adapter; its number is vLLM's own and tells nothing here."""

    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None


class AdapterRoutes:
    """The routes under /v1/adapters, and vLLM's two."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._receiver = Receiver(config.max_adapter_bytes)
        # Threads of their own: requests are parsed in asyncio's, and must not wait for a disk.
        self._publishers = ThreadPoolExecutor(
            _NUM_WORKERS, "publisher", initializer=lower_priority, initargs=(_NICENESS,)
        )
        self._changers = ThreadPoolExecutor(_NUM_WORKERS, "changer")
        self._readers = ThreadPoolExecutor(_NUM_WORKERS, "reader")
        self.router = router = APIRouter(prefix="/v1")
        if_match: dict[str, Any] = {"parameters": [IF_MATCH]}
        rollback = takes_json(RollbackFields, is_required=False)
        for method, path, answer, takes in (
            ("GET", "/adapters", self.list_adapters, None),
            ("POST", "/adapters", self.create, takes_form(AdapterForm)),
            ("POST", "/adapters/{name:path}/pin", self.pin, None),
            ("POST", "/adapters/{name:path}/unpin", self.unpin, None),
            ("POST", "/adapters/{name:path}/rollback", self.roll_back, rollback | if_match),
            ("GET", "/adapters/{name:path}", self.show, None),
            ("PUT", "/adapters/{name:path}", self.publish, takes_form(VersionForm) | if_match),
            ("DELETE", "/adapters/{name:path}", self.delete, if_match),
            ("POST", "/load_lora_adapter", self.load_lora_adapter, takes_json(LoadFields)),
            ("POST", "/unload_lora_adapter", self.unload_lora_adapter, takes_json(UnloadFields)),
        ):
            router.add_api_route(
                path, answer, methods=[method], response_model=None, openapi_extra=takes
            )

    def stop(self) -> None:
        """Begin no change any more: those that wait are refused, those that have begun may end."""
        for workers in (self._publishers, self._changers):
            workers.shutdown(wait=False, cancel_futures=True)

    async def list_adapters(
        self,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: str | None = None,
    ) -> Response:
        """The adapters that the caller may see, by name, `limit` of them after the name `after`."""
        seen = visible(_caller(request), _registry(request))
        names = sorted(name for name in seen if after is None or name > after)
        page = names[:limit]
        content = {
            "object": "list",
            "data": [self._describe(request, seen[name]) for name in page],
            "first_id": page[0] if page else None,
            "last_id": page[-1] if page else None,
            "has_more": len(names) > len(page),
        }
        return AsciiJSONResponse(content)

    async def show(self, request: Request, name: str) -> Response:
        """One adapter with its versions."""
        published = self._find(request, name)
        return await self._answer(request, published, is_changed=False)

    async def create(self, request: Request) -> Response:
        """Publish a new adapter."""
        async with self._receiver.receive(request, _caller(request).tenant) as upload:
            if upload.name is None:
                raise BodyError([Problem("name", "missing_required_parameter", "must be given")])
            name = creatable(_caller(request), _registry(request), upload.name)
            published = await self._publish(request, name, upload, must_be_new=True)
        return await self._answer(request, published, status=201)

    async def publish(self, request: Request, name: str) -> Response:
        """Publish a new version of an adapter."""
        async with self._receiver.receive(request, _caller(request).tenant) as upload:
            if upload.name is not None and upload.name != name:
                raise InvalidRequestError(
                    f"name: {upload.name[:200]!r} is not the name in the path; leave it out",
                    param="name",
                )
            target = _changeable(request, name)
            published = await self._publish(request, target, upload, must_be_new=False)
        return await self._answer(request, published)

    async def delete(self, request: Request, name: str) -> Response:
        """Remove an adapter; requests that run end on their version."""
        target, expected = _changeable(request, name), _if_match(request)
        await self._remove(request, target, expected)
        return AsciiJSONResponse({"id": name, "object": "adapter", "deleted": True})

    async def pin(self, request: Request, name: str) -> Response:
        """Keep an adapter on the device."""
        return await self._set_pinned(request, name, True)

    async def unpin(self, request: Request, name: str) -> Response:
        """Let an adapter be evicted again."""
        return await self._set_pinned(request, name, False)

    async def roll_back(self, request: Request, name: str) -> Response:
        """Serve an earlier version again."""
        content = await read_body(request, self._config.max_request_bytes)
        fields = parse_body(content, RollbackFields) if content else RollbackFields()
        target, expected = _changeable(request, name), _if_match(request)
        published = await self._change(
            request,
            "rolled back",
            target,
            lambda: _registry(request).roll_back(target, fields.version, expected=expected),
        )
        return await self._answer(request, published)

    async def load_lora_adapter(self, request: Request) -> Response:
        """As vLLM's: publish a folder of the adapters folder under a name."""
        require_admin(_caller(request))
        fields = parse_body(await read_body(request, self._config.max_request_bytes), LoadFields)
        path = self._inside_adapters_folder(fields.lora_path)
        name = creatable(_caller(request), _registry(request), fields.lora_name)
        must_be_new = None if fields.load_inplace else True
        try:
            await self._change(
                request,
                "published",
                name,
                lambda: _registry(request).publish(name, path, must_be_new=must_be_new),
                self._publishers,
            )
        except AdapterExistsError:
            raise InvalidRequestError(
                f"The lora adapter {fields.lora_name!r} has already been loaded. If you want to "
                "load the adapter in place, set 'load_inplace' to True.",
                param="lora_name",
            ) from None
        return PlainTextResponse(f"Success: LoRA adapter '{fields.lora_name}' added successfully.")

    async def unload_lora_adapter(self, request: Request) -> Response:
        """As vLLM's: remove an adapter."""
        require_admin(_caller(request))
        fields = parse_body(await read_body(request, self._config.max_request_bytes), UnloadFields)
        await self._remove(request, _changeable(request, fields.lora_name), None)
        return PlainTextResponse(
            f"Success: LoRA adapter '{fields.lora_name}' removed successfully."
        )

    async def _publish(
        self, request: Request, name: AdapterName, upload: Upload, *, must_be_new: bool
    ) -> Published:
        registry, expected = _registry(request), _if_match(request)

        def publish() -> Published:
            with registry.scratch() as folder:
                path = unpack(upload.file, folder, max_bytes=self._config.max_adapter_bytes)
                return registry.publish(name, path, must_be_new=must_be_new, expected=expected)

        return await self._change(request, "published", name, publish, self._publishers)

    async def _remove(self, request: Request, name: AdapterName, expected: str | None) -> None:
        registry = _registry(request)
        await self._change(
            request, "removed", name, lambda: registry.remove(name, expected=expected)
        )
        _context(request).metrics.usage.forget(name.text)

    async def _set_pinned(self, request: Request, name: str, is_pinned: bool) -> Response:
        require_admin(_caller(request))  # the device's memory is everybody's
        target = _changeable(request, name)
        published = await self._change(
            request,
            "pinned" if is_pinned else "unpinned",
            target,
            lambda: _registry(request).set_pinned(target, is_pinned),
        )
        return await self._answer(request, published)

    async def _change(
        self,
        request: Request,
        what: str,
        name: AdapterName,
        change: Callable[[], _Result],
        workers: ThreadPoolExecutor | None = None,
    ) -> _Result:
        """Run a change to its end, even if the client goes: it is then done or not, never half.

        Without `workers` it is one without an upload.
        """
        drain: Drain = request.app.state.drain
        drain.check()
        loop = asyncio.get_running_loop()
        try:
            result = await loop.run_in_executor(workers or self._changers, change)
        except asyncio.CancelledError:
            drain.check()  # it had not begun when `stop` was called
            raise
        fields = {"model": name.text}
        if isinstance(result, Published):
            fields["version"] = result.version.digest
        logger.info("adapter %s", what, extra=request_fields(request.scope["state"]) | fields)
        return result

    def _find(self, request: Request, name: str) -> Published:
        caller = _caller(request)
        try:
            return _registry(request).find(*caller.candidates(name))
        except ModelNotFoundError:
            raise unknown_adapter(name) from None

    def _inside_adapters_folder(self, text: str) -> Path:
        folder = self._config.adapters
        if folder is None:
            raise InvalidRequestError(
                "lora_path: this server has no adapters folder (--adapters); upload the adapter "
                "with POST /v1/adapters",
                param="lora_path",
            )
        root = folder.resolve()
        try:
            path = (root / text).resolve()
            is_inside = path.is_relative_to(root) and path != root and path.exists()
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, a loop of links
            is_inside = False
        if not is_inside:
            raise InvalidRequestError(
                f"lora_path: {text[:200]!r} is no folder in the server's adapters folder; give its "
                "name there",
                param="lora_path",
            )
        return path

    async def _answer(
        self,
        request: Request,
        published: Published,
        *,
        status: int = 200,
        is_changed: bool = True,
    ) -> Response:
        """An adapter with its versions, and the version as its entity tag."""
        content = self._describe(request, published)
        try:
            content["versions"] = await self._versions(request, published)
        except StorageError as error:
            if not is_changed:
                raise
            # An error would say that nothing was changed.
            logger.warning("the versions of %s are not told: %s", published.name.text, error)
            content["versions"] = None
        headers = {"etag": f'"{published.version.digest}"'}
        if status == 201:
            headers["location"] = f"/v1/adapters/{content['name']}"
        request.state.adapter_version = published.version.digest
        return AsciiJSONResponse(content, status_code=status, headers=headers)

    async def _versions(self, request: Request, published: Published) -> list[dict[str, Any]]:
        versions = await asyncio.get_running_loop().run_in_executor(
            self._readers, _registry(request).versions, published.name
        )
        return [
            {
                "version": version.digest,
                "published_at": int(version.published_at),
                "is_current": version.digest == published.version.digest,
            }
            for version in versions
        ]

    def _describe(self, request: Request, published: Published) -> dict[str, Any]:
        caller, context = _caller(request), _context(request)
        summary, name = published.summary, caller.shown(published.name)
        # A public adapter is where it is, and used as it is, by whatever all tenants ask of it.
        is_told = caller.is_admin or published.name.owner is not None
        residency = context.engine.adapters.tier(published.version)
        counts = context.metrics.usage.of(published.name.text)
        return {
            "id": name,
            "object": "adapter",
            "name": name,
            "owner": published.name.owner,
            "base": self._config.base_name,
            "version": published.version.digest,
            "digest": published.version.digest,
            "created_at": int(published.created_at),
            "from_folder": published.is_from_folder,
            "pinned": published.is_pinned,
            "residency": residency if is_told else None,
            "sharing": summary.sharing,
            "shares_qkv": summary.shares_qkv,
            "ranks": list(summary.ranks),
            "modules": [module.rpartition(".")[2] for module in summary.modules],
            "num_layers": summary.num_layers,
            "num_factors": summary.num_factors,
            "bytes_stored": summary.stored_bytes,
            "bytes_expanded": summary.expanded_bytes,
            "counts": asdict(counts) if is_told else None,
        }


def _context(request: Request) -> GenerationContext:
    context: GenerationContext = request.app.state.context
    return context


def _registry(request: Request) -> AdapterRegistry:
    return _context(request).registry


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def _changeable(request: Request, text: str) -> AdapterName:
    return changeable(_caller(request), _registry(request), text)


def _if_match(request: Request) -> str | None:
    """The version that If-Match names, None for any; InvalidRequestError for several."""
    tag = ", ".join(request.headers.getlist("if-match") or ["*"]).strip()
    if "," in tag:
        raise InvalidRequestError("If-Match: names several versions; give one", param="If-Match")
    return None if tag == "*" else tag.strip('"')
