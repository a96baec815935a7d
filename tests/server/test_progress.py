"""Where a prompt stands: told by the engine, in comments and in chunks; and its pages are free when nobody waits."""

import asyncio
from array import array
from typing import Any

from leanserve.contracts.config import BatchOptions
from leanserve.contracts.kv_sharding import KvSharding
from leanserve.contracts.messages import PrefillProgress, Submit, TokenOutputs, encode
from leanserve.contracts.sampling import SamplingParams
from leanserve.engine.engine import Engine
from leanserve.engine.scheduler import Scheduler
from engine.fake_executors import FakeExecutor
from server.front_end import Live, live_server, parse_events, run
