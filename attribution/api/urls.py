from attribution.api.views import ArtifactViewSet, DisclosureViewSet, ModelViewSet

routes = [
    ("artifacts", ArtifactViewSet, "artifact"),
    ("disclosures", DisclosureViewSet, "disclosure"),
    ("models", ModelViewSet, "model"),
]
paths: list = []
