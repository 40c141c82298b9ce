from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("message", "index", "total", "length", "checksum", "payload")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    message: int
    index: int
    total: int
    length: int
    checksum: int
    payload: bytes
    def __init__(self, message: _Optional[int] = ..., index: _Optional[int] = ..., total: _Optional[int] = ..., length: _Optional[int] = ..., checksum: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("hello", "welcome", "refusal", "forward", "input", "output", "hidden", "hidden_gradient", "gradient", "input_gradient", "finished", "bye", "file_part", "killed", "wait", "tensors")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    BYE_FIELD_NUMBER: _ClassVar[int]
    FILE_PART_FIELD_NUMBER: _ClassVar[int]
    KILLED_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    refusal: Refusal
    forward: Forward
    input: Input
    output: Output
    hidden: Hidden
    hidden_gradient: HiddenGradient
    gradient: Gradient
    input_gradient: InputGradient
    finished: Finished
    bye: Bye
    file_part: FilePart
    killed: Killed
    wait: Wait
    tensors: _containers.RepeatedCompositeFieldContainer[TensorInfo]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., forward: _Optional[_Union[Forward, _Mapping]] = ..., input: _Optional[_Union[Input, _Mapping]] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., hidden: _Optional[_Union[Hidden, _Mapping]] = ..., hidden_gradient: _Optional[_Union[HiddenGradient, _Mapping]] = ..., gradient: _Optional[_Union[Gradient, _Mapping]] = ..., input_gradient: _Optional[_Union[InputGradient, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., bye: _Optional[_Union[Bye, _Mapping]] = ..., file_part: _Optional[_Union[FilePart, _Mapping]] = ..., killed: _Optional[_Union[Killed, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[TensorInfo, _Mapping]]] = ...) -> None: ...

class TensorInfo(_message.Message):
    __slots__ = ("codec", "shape")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    codec: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, codec: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "atoll_version", "base_digest", "tokenizer_digest", "cut_front", "cut_back", "adapter_kind", "modules", "wire_mode", "codec", "precision", "max_tokens", "adapter_codec", "dropout")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    ATOLL_VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CUT_FRONT_FIELD_NUMBER: _ClassVar[int]
    CUT_BACK_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_KIND_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    WIRE_MODE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_CODEC_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    atoll_version: str
    base_digest: str
    tokenizer_digest: str
    cut_front: int
    cut_back: int
    adapter_kind: str
    modules: _containers.RepeatedCompositeFieldContainer[Module]
    wire_mode: str
    codec: str
    precision: str
    max_tokens: int
    adapter_codec: str
    dropout: float
    def __init__(self, protocol: _Optional[int] = ..., atoll_version: _Optional[str] = ..., base_digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., cut_front: _Optional[int] = ..., cut_back: _Optional[int] = ..., adapter_kind: _Optional[str] = ..., modules: _Optional[_Iterable[_Union[Module, _Mapping]]] = ..., wire_mode: _Optional[str] = ..., codec: _Optional[str] = ..., precision: _Optional[str] = ..., max_tokens: _Optional[int] = ..., adapter_codec: _Optional[str] = ..., dropout: _Optional[float] = ...) -> None: ...

class Module(_message.Message):
    __slots__ = ("name", "rank", "killed", "scaling")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    KILLED_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    name: str
    rank: int
    killed: str
    scaling: float
    def __init__(self, name: _Optional[str] = ..., rank: _Optional[int] = ..., killed: _Optional[str] = ..., scaling: _Optional[float] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("session", "atoll_version", "groups", "bits", "max_tokens", "idle_seconds")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ATOLL_VERSION_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    session: str
    atoll_version: str
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    bits: int
    max_tokens: int
    idle_seconds: float
    def __init__(self, session: _Optional[str] = ..., atoll_version: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., bits: _Optional[int] = ..., max_tokens: _Optional[int] = ..., idle_seconds: _Optional[float] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("modules",)
    MODULES_FIELD_NUMBER: _ClassVar[int]
    modules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, modules: _Optional[_Iterable[str]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "field", "host_value", "device_value", "do", "retry_seconds")
    CODE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    HOST_VALUE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_VALUE_FIELD_NUMBER: _ClassVar[int]
    DO_FIELD_NUMBER: _ClassVar[int]
    RETRY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    code: str
    field: str
    host_value: str
    device_value: str
    do: str
    retry_seconds: float
    def __init__(self, code: _Optional[str] = ..., field: _Optional[str] = ..., host_value: _Optional[str] = ..., device_value: _Optional[str] = ..., do: _Optional[str] = ..., retry_seconds: _Optional[float] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("field", "host_value", "device_value", "do", "seconds")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    HOST_VALUE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_VALUE_FIELD_NUMBER: _ClassVar[int]
    DO_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    field: str
    host_value: str
    device_value: str
    do: str
    seconds: float
    def __init__(self, field: _Optional[str] = ..., host_value: _Optional[str] = ..., device_value: _Optional[str] = ..., do: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class Killed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Forward(_message.Message):
    __slots__ = ("exchange", "rows", "positions", "lengths", "wanted", "position_ids", "train", "want_front_gradient", "has_factors", "checkpoint", "generator", "keep", "follows")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    WANT_FRONT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    HAS_FACTORS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    GENERATOR_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    FOLLOWS_FIELD_NUMBER: _ClassVar[int]
    exchange: int
    rows: int
    positions: int
    lengths: _containers.RepeatedScalarFieldContainer[int]
    wanted: _containers.RepeatedScalarFieldContainer[int]
    position_ids: _containers.RepeatedScalarFieldContainer[int]
    train: bool
    want_front_gradient: bool
    has_factors: bool
    checkpoint: bool
    generator: bytes
    keep: bool
    follows: int
    def __init__(self, exchange: _Optional[int] = ..., rows: _Optional[int] = ..., positions: _Optional[int] = ..., lengths: _Optional[_Iterable[int]] = ..., wanted: _Optional[_Iterable[int]] = ..., position_ids: _Optional[_Iterable[int]] = ..., train: _Optional[bool] = ..., want_front_gradient: _Optional[bool] = ..., has_factors: _Optional[bool] = ..., checkpoint: _Optional[bool] = ..., generator: _Optional[bytes] = ..., keep: _Optional[bool] = ..., follows: _Optional[int] = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("exchange", "group")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    exchange: int
    group: int
    def __init__(self, exchange: _Optional[int] = ..., group: _Optional[int] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("exchange", "group")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    exchange: int
    group: int
    def __init__(self, exchange: _Optional[int] = ..., group: _Optional[int] = ...) -> None: ...

class Hidden(_message.Message):
    __slots__ = ("exchange", "generator", "kept", "evicted")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    GENERATOR_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    exchange: int
    generator: bytes
    kept: bool
    evicted: bool
    def __init__(self, exchange: _Optional[int] = ..., generator: _Optional[bytes] = ..., kept: _Optional[bool] = ..., evicted: _Optional[bool] = ...) -> None: ...

class HiddenGradient(_message.Message):
    __slots__ = ("exchange", "want_factor_gradients")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    WANT_FACTOR_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    exchange: int
    want_factor_gradients: bool
    def __init__(self, exchange: _Optional[int] = ..., want_factor_gradients: _Optional[bool] = ...) -> None: ...

class Gradient(_message.Message):
    __slots__ = ("exchange", "group", "want_input_gradient")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    WANT_INPUT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    exchange: int
    group: int
    want_input_gradient: bool
    def __init__(self, exchange: _Optional[int] = ..., group: _Optional[int] = ..., want_input_gradient: _Optional[bool] = ...) -> None: ...

class InputGradient(_message.Message):
    __slots__ = ("exchange", "group")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    exchange: int
    group: int
    def __init__(self, exchange: _Optional[int] = ..., group: _Optional[int] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("exchange",)
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    exchange: int
    def __init__(self, exchange: _Optional[int] = ...) -> None: ...

class Bye(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FilePart(_message.Message):
    __slots__ = ("name", "size", "offset", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    offset: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., offset: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class PartRequest(_message.Message):
    __slots__ = ("protocol", "cut_front", "cut_back")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CUT_FRONT_FIELD_NUMBER: _ClassVar[int]
    CUT_BACK_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    cut_front: int
    cut_back: int
    def __init__(self, protocol: _Optional[int] = ..., cut_front: _Optional[int] = ..., cut_back: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("protocol", "atoll_version", "base_digest", "tokenizer_digest", "num_blocks", "bits", "precision", "codecs", "wire_modes", "adapter_kinds", "max_tokens", "max_rank", "sessions", "max_sessions", "uptime_seconds", "tokens", "tokens_per_second", "resident_bytes", "open", "tenants", "cache_bytes", "max_cache_bytes")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    ATOLL_VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    WIRE_MODES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_KINDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    atoll_version: str
    base_digest: str
    tokenizer_digest: str
    num_blocks: int
    bits: int
    precision: str
    codecs: _containers.RepeatedScalarFieldContainer[str]
    wire_modes: _containers.RepeatedScalarFieldContainer[str]
    adapter_kinds: _containers.RepeatedScalarFieldContainer[str]
    max_tokens: int
    max_rank: int
    sessions: int
    max_sessions: int
    uptime_seconds: float
    tokens: int
    tokens_per_second: float
    resident_bytes: int
    open: _containers.RepeatedCompositeFieldContainer[SessionStatus]
    tenants: _containers.RepeatedCompositeFieldContainer[TenantStatus]
    cache_bytes: int
    max_cache_bytes: int
    def __init__(self, protocol: _Optional[int] = ..., atoll_version: _Optional[str] = ..., base_digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., num_blocks: _Optional[int] = ..., bits: _Optional[int] = ..., precision: _Optional[str] = ..., codecs: _Optional[_Iterable[str]] = ..., wire_modes: _Optional[_Iterable[str]] = ..., adapter_kinds: _Optional[_Iterable[str]] = ..., max_tokens: _Optional[int] = ..., max_rank: _Optional[int] = ..., sessions: _Optional[int] = ..., max_sessions: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., tokens: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., resident_bytes: _Optional[int] = ..., open: _Optional[_Iterable[_Union[SessionStatus, _Mapping]]] = ..., tenants: _Optional[_Iterable[_Union[TenantStatus, _Mapping]]] = ..., cache_bytes: _Optional[int] = ..., max_cache_bytes: _Optional[int] = ...) -> None: ...

class SessionStatus(_message.Message):
    __slots__ = ("session", "tenant", "seconds", "tokens", "exchanges", "sent_bytes", "received_bytes", "positions", "compute_seconds", "cache_bytes")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXCHANGES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    session: str
    tenant: str
    seconds: float
    tokens: int
    exchanges: int
    sent_bytes: int
    received_bytes: int
    positions: int
    compute_seconds: float
    cache_bytes: int
    def __init__(self, session: _Optional[str] = ..., tenant: _Optional[str] = ..., seconds: _Optional[float] = ..., tokens: _Optional[int] = ..., exchanges: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., positions: _Optional[int] = ..., compute_seconds: _Optional[float] = ..., cache_bytes: _Optional[int] = ...) -> None: ...

class TenantStatus(_message.Message):
    __slots__ = ("tenant", "sessions", "max_sessions", "max_tokens_per_second", "burst_tokens", "tokens_left", "held_seconds", "max_bytes", "period_seconds", "bytes", "free_seconds", "again_seconds")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    BURST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_LEFT_FIELD_NUMBER: _ClassVar[int]
    HELD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    PERIOD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    AGAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    sessions: int
    max_sessions: int
    max_tokens_per_second: float
    burst_tokens: float
    tokens_left: float
    held_seconds: float
    max_bytes: int
    period_seconds: float
    bytes: int
    free_seconds: float
    again_seconds: float
    def __init__(self, tenant: _Optional[str] = ..., sessions: _Optional[int] = ..., max_sessions: _Optional[int] = ..., max_tokens_per_second: _Optional[float] = ..., burst_tokens: _Optional[float] = ..., tokens_left: _Optional[float] = ..., held_seconds: _Optional[float] = ..., max_bytes: _Optional[int] = ..., period_seconds: _Optional[float] = ..., bytes: _Optional[int] = ..., free_seconds: _Optional[float] = ..., again_seconds: _Optional[float] = ...) -> None: ...
