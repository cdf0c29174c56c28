"""Many answers at once from one model: `Server`."""

from mmpt.serve.server import Server as Server
