from stillhouse.configs.base import Config


class EndpointConfig(Config):
    url: str
    model: str
