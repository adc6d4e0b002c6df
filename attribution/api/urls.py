from attribution.api.views import ArtifactViewSet, DisclosureViewSet, MeteredRunViewSet, ModelViewSet

routes = [
    ("artifacts", ArtifactViewSet, "artifact"),
    ("disclosures", DisclosureViewSet, "disclosure"),
    ("metered-runs", MeteredRunViewSet, "metered-run"),
    ("models", ModelViewSet, "model"),
]
paths: list = []
