"""Encryption: certificates of the server, and of clients, by files."""

import datetime
import ipaddress
import runpy
import ssl

import numpy as np
import pytest

from openpi_like.serve.client import PolicyClient
from tests.conftest import REPOSITORY
from tests.serve.running import serving

x509 = pytest.importorskip("cryptography.x509")
PROGRAM = runpy.run_path(str(REPOSITORY / "serve" / "policy_server.py"), run_name="policy_server")


class Authority:
    """Signs certificates."""

    def __init__(self, directory, name):
        from cryptography.hazmat.primitives.asymmetric import ec

        self._directory = directory
        self._key, self._name = ec.generate_private_key(ec.SECP256R1()), _named(name)
        self.certificate = self._sign(self._name, self._key.public_key(), ca=True)
        self.file = directory / f"{name}.pem"
        self.file.write_bytes(_pem(self.certificate))

    def issue(self, name):
        """Returns the files of a certificate and its key."""
        from cryptography.hazmat.primitives import serialization as s
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        files = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        files[0].write_bytes(_pem(self._sign(_named(name), key.public_key(), ca=False)))
        files[1].write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
        return files

    def _sign(self, subject, key, *, ca):
        from cryptography.hazmat.primitives import hashes

        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        made = x509.CertificateBuilder(self._name, subject, key, x509.random_serial_number(), now - day, now + day)
        made = made.add_extension(x509.BasicConstraints(ca, None), critical=True).add_extension(address, False)
        own = x509.SubjectKeyIdentifier.from_public_key(key)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        usage = {k: ca for k in ("key_cert_sign", "crl_sign")} | {"digital_signature": True}
        unused = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
        usage |= dict.fromkeys((*unused, "encipher_only", "decipher_only"), False)
        made = made.add_extension(own, False).add_extension(issuer, False).add_extension(x509.KeyUsage(**usage), True)
        return made.sign(self._key, hashes.SHA256())


def _named(name):
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _pem(certificate):
    from cryptography.hazmat.primitives import serialization as s

    return certificate.public_bytes(s.Encoding.PEM)


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    directory = tmp_path_factory.mktemp("certificates")
    return Authority(directory, "ours"), Authority(directory, "theirs")


def _tls(certificates, client_ca=None):
    args = PROGRAM["Args"](REPOSITORY, cert=certificates[0], cert_key=certificates[1], client_ca=client_ca)
    return PROGRAM["tls_of"](args)


def _client(server, ca, own=None):
    context = ssl.create_default_context(cafile=ca)
    if own is not None:
        context.load_cert_chain(*own)
    return PolicyClient(port=server.port, tls=context, reconnect_s=0.5)


def _asks(client):
    observation = {"state": np.ones(2, np.float32), "prompt": "go"}
    try:
        return client.infer(observation)["actions"].tolist()
    finally:
        client.close()


def _echo(observation):
    return observation["state"][None]


def test_a_server_shows_its_certificate(authorities):
    ours, theirs = authorities
    with serving(_echo, tls=_tls(ours.issue("server"))) as server:
        assert _asks(_client(server, ours.file)) == [[1.0, 1.0]]
        with pytest.raises(ConnectionError, match="certificate"):
            _client(server, theirs.file)
        with pytest.raises(ConnectionError):  # not encrypted
            PolicyClient(port=server.port, reconnect_s=0.2)


def test_clients_may_have_to_show_theirs(authorities):
    ours, theirs = authorities
    with serving(_echo, tls=_tls(ours.issue("server"), ours.file)) as server:
        assert _asks(_client(server, ours.file, ours.issue("robot"))) == [[1.0, 1.0]]
        for own in (None, theirs.issue("stranger")):
            with pytest.raises(ConnectionError):
                _client(server, ours.file, own)
        assert _asks(_client(server, ours.file, ours.issue("robot"))) == [[1.0, 1.0]]


def test_files_that_do_not_fit_are_refused(authorities):
    ours, theirs = authorities
    (certificate, _), (_, key) = ours.issue("server"), theirs.issue("server2")
    with pytest.raises(ssl.SSLError, match="KEY_VALUES_MISMATCH"):
        _tls((certificate, key))
    with pytest.raises(ValueError, match="--client-ca and --cert-key need --cert"):
        PROGRAM["tls_of"](PROGRAM["Args"](REPOSITORY, client_ca=ours.file))
