//! A minimal etcd client over gRPC. All requests of a process use one connection.

use prost::Message;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

/// A client. Clones share one connection.
#[derive(Clone)]
pub(crate) struct Etcd {
    channel: Grpc<Channel>,
}

/// The result of a granted lock.
pub(crate) struct Ownership {
    /// The key that exists as long as the lock is held.
    pub(crate) key: Vec<u8>,
    /// The revision of the store at the grant. The key of the previous holder was deleted before,
    /// and each change has a revision of its own. So it grows from holder to holder.
    pub(crate) revision: i64,
}

impl Etcd {
    pub(crate) async fn connect(url: &str) -> anyhow::Result<Self> {
        let channel = Endpoint::from_shared(url.to_owned())?.connect().await?;
        Ok(Self { channel: Grpc::new(channel) })
    }

    pub(crate) async fn version(&self) -> anyhow::Result<String> {
        let path = "/etcdserverpb.Maintenance/Status";
        let status: StatusResponse = self.call(path, StatusRequest {}).await?;
        Ok(status.version)
    }

    pub(crate) async fn grant_lease(&self, seconds: i64) -> anyhow::Result<i64> {
        let request = LeaseGrantRequest { seconds };
        let granted: LeaseGrantResponse = self.call("/etcdserverpb.Lease/LeaseGrant", request).await?;
        Ok(granted.lease)
    }

    /// Also deletes the keys of the lease.
    pub(crate) async fn revoke_lease(&self, lease: i64) -> anyhow::Result<()> {
        let request = LeaseRequest { lease };
        let _revoked: Empty = self.call("/etcdserverpb.Lease/LeaseRevoke", request).await?;
        Ok(())
    }

    pub(crate) async fn keep_alive(&self, leases: &[i64]) -> anyhow::Result<()> {
        let requests: Vec<_> = leases.iter().map(|lease| LeaseRequest { lease: *lease }).collect();
        let requests = Request::new(tokio_stream::iter(requests));
        let path = PathAndQuery::from_static("/etcdserverpb.Lease/LeaseKeepAlive");
        let mut channel = self.channel.clone();
        channel.ready().await?;
        let codec = ProstCodec::<LeaseRequest, Empty>::default();
        let mut answers = channel.streaming(requests, path, codec).await?.into_inner();
        while answers.message().await?.is_some() {}
        Ok(())
    }

    /// Waits for the lock. The owner is the lease: a second request with the same lease is granted
    /// immediately.
    pub(crate) async fn lock(&self, name: &[u8], lease: i64) -> anyhow::Result<Ownership> {
        let request = LockRequest { name: name.to_vec(), lease };
        let LockResponse { header, key } = self.call("/v3lockpb.Lock/Lock", request).await?;
        Ok(Ownership { key, revision: header.unwrap_or_default().revision })
    }

    pub(crate) async fn unlock(&self, key: Vec<u8>) -> anyhow::Result<()> {
        let _unlocked: Empty = self.call("/v3lockpb.Lock/Unlock", UnlockRequest { key }).await?;
        Ok(())
    }

    async fn call<Q, A>(&self, path: &'static str, request: Q) -> anyhow::Result<A>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut channel = self.channel.clone();
        channel.ready().await?;
        let path = PathAndQuery::from_static(path);
        let answer = channel.unary(Request::new(request), path, ProstCodec::<Q, A>::default()).await;
        // The display form of a status would include all headers.
        Ok(answer
            .map_err(|status: Status| anyhow::anyhow!("{}: {}", status.code(), status.message()))?
            .into_inner())
    }
}

// The messages of `rpc.proto` and `v3lock.proto` of etcd, without the fields that are not used.
// Decoders skip unknown fields.

#[derive(Clone, PartialEq, Message)]
struct Empty {}

#[derive(Clone, PartialEq, Message)]
struct Header {
    #[prost(int64, tag = "3")]
    revision: i64,
}

#[derive(Clone, PartialEq, Message)]
struct StatusRequest {}

#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct LeaseGrantRequest {
    #[prost(int64, tag = "1")]
    seconds: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LeaseGrantResponse {
    #[prost(int64, tag = "2")]
    lease: i64,
}

/// Revokes a lease or keeps it alive.
#[derive(Clone, PartialEq, Message)]
struct LeaseRequest {
    #[prost(int64, tag = "1")]
    lease: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LockRequest {
    #[prost(bytes = "vec", tag = "1")]
    name: Vec<u8>,
    #[prost(int64, tag = "2")]
    lease: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LockResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct UnlockRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}
