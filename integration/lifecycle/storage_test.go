// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/google/nftables"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	eventtypes "github.com/containerd/containerd/api/events"

	storageAPI "github.com/cohort-project/cohort/api/storage/v1"
)

// storage asks cohortd.
func (w *world) storage(f func(storageAPI.StorageService) error) {
	w.Helper()
	conn, err := shim.AnonDialer("unix://"+filepath.Join(w.in.Root, "host.sock"), 5*time.Second)
	w.must(err)
	c := ttrpc.NewClient(conn)
	defer c.Close()
	w.must(f(storageAPI.NewStorageClient(c)))
}

// captures lists what cohortd holds.
func (w *world) captures() (list []*storageAPI.Capture) {
	w.Helper()
	w.storage(func(s storageAPI.StorageService) error {
		resp, err := s.List(w.ctx, &storageAPI.Empty{})
		list = resp.GetCaptures()
		return err
	})
	return list
}

func (w *world) discard(id string) {
	w.Helper()
	w.storage(func(s storageAPI.StorageService) error {
		_, err := s.Discard(w.ctx, &storageAPI.CaptureRequest{Id: id})
		return err
	})
}

// subscribe begins to listen to containerd's events.
func (w *world) subscribe(ctx context.Context, topic string) (<-chan *events.Envelope, <-chan error) {
	w.Helper()
	return w.in.Client(w).EventService().Subscribe(ctx, `topic=="`+topic+`"`)
}

// decodeEvent is the event of an envelope, nil if it is none of T.
func decodeEvent[T any](e *events.Envelope) *T {
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		return nil
	}
	t, _ := v.(*T)
	return t
}

type imageCreate = eventtypes.ImageCreate

// write puts a blob into the content store, kept by a label.
func (w *world) write(ctx context.Context, d ocispec.Descriptor, b []byte) {
	w.Helper()
	w.must(content.WriteBlob(ctx, w.in.Client(w).ContentStore(), d.Digest.String(), bytes.NewReader(b), d))
}

// tablesOf lists the nftables tables of a network namespace.
func tablesOf(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	conn, err := nftables.New(nftables.WithNetNSFd(int(f.Fd())))
	if err != nil {
		return nil, err
	}
	tables, err := conn.ListTables()
	var names []string
	for _, t := range tables {
		names = append(names, t.Name)
	}
	return names, err
}
