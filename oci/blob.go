// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cohort-project/cohort/runtime/pace"
)

// Compression of the layers that cohort adds.
type Compression string

// The zero value is Zstd at its fastest level. Docker before 23.0 and containerd before
// 1.5 cannot unpack zstd; Gzip is for them. None is the fastest to unpack.
const (
	Zstd Compression = "zstd"
	Gzip Compression = "gzip"
	None Compression = "none"
)

const (
	chunkSize = 1 << 20 // one read of a file, one write to the content store
	chunks    = 8       // in flight between the tar writer and the compressor

	pieceSize = 256 << 10 // what is hashed and compressed without a pause on a busy host
)

// What the removal of an ingest takes at the most: see abortIngest.
const (
	abortTimeout = 10 * time.Second
	abortTries   = 50
	abortPause   = 20 * time.Millisecond
)

func (c Compression) mediaType() (string, error) {
	switch c {
	case Zstd, "":
		return ocispec.MediaTypeImageLayerZstd, nil
	case Gzip:
		return ocispec.MediaTypeImageLayerGzip, nil
	case None:
		return ocispec.MediaTypeImageLayer, nil
	}
	return "", fmt.Errorf("compression %q: use zstd, gzip or none: %w", c, errdefs.ErrInvalidArgument)
}

// writer returns the compressor. Fastest and two workers were chosen by
// measurement, see docs/image-format.md.
func (c Compression) writer(w io.Writer) (io.WriteCloser, error) {
	switch c {
	case Gzip:
		return gzip.NewWriterLevel(w, gzip.BestSpeed)
	case None:
		return nopWriteCloser{w}, nil
	}
	return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(2))
}

type nopWriteCloser struct{ io.Writer }

func (nopWriteCloser) Close() error { return nil }

// writeLayer streams what fill writes into the content store as one layer, in
// one pass: digest, diff id and size come out together. On error no ingest is
// left behind.
func writeLayer(ctx context.Context, store content.Store, comp Compression, kind string, ck *Checkpoint, fill func(io.Writer) error) (out layer, err error) {
	mediaType, err := comp.mediaType()
	if err != nil {
		return out, err
	}
	// The ref is unguessable: two builds must not continue each other's ingest.
	ref := "cohort-" + kind + "-" + rand.Text()
	committed := false
	defer func() {
		if !committed {
			err = errors.Join(err, abortIngest(ctx, store, ref))
		}
	}()
	cw, err := content.OpenWriter(ctx, store, content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{MediaType: mediaType}))
	if err != nil {
		return out, fmt.Errorf("opening an ingest for the %s layer: %w", kind, err)
	}
	defer cw.Close()

	counted := &countingWriter{w: &chunkWriter{w: cw, buf: make([]byte, 0, chunkSize)}}
	z, err := comp.writer(counted)
	if err != nil {
		return out, err
	}
	digester := digest.SHA256.Digester()
	p := newPipeline(ctx, digester.Hash(), z)
	err = fill(p)
	err = errors.Join(err, p.Close())
	err = errors.Join(err, z.Close())
	if err == nil {
		err = counted.w.(*chunkWriter).flush()
	}
	if err != nil {
		return out, fmt.Errorf("writing the %s layer: %w", kind, err)
	}
	out.diffID = digester.Digest()
	out.desc = ocispec.Descriptor{
		MediaType: mediaType,
		Digest:    cw.Digest(),
		Size:      counted.n,
		Annotations: map[string]string{
			AnnotationLayer: kind, AnnotationEpoch: ck.Epoch, AnnotationEpochNumber: strconv.FormatUint(ck.EpochNumber, 10),
		},
	}
	uncompressed := map[string]string{labels.LabelUncompressed: out.diffID.String()}
	err = cw.Commit(ctx, out.desc.Size, out.desc.Digest, content.WithLabels(uncompressed))
	if errdefs.IsAlreadyExists(err) {
		// The same bytes were there, perhaps without the label.
		_, err = store.Update(ctx, content.Info{Digest: out.desc.Digest, Labels: uncompressed}, "labels."+labels.LabelUncompressed)
	}
	if err != nil {
		return out, fmt.Errorf("committing the %s layer: %w", kind, err)
	}
	committed = true
	return out, nil
}

// abortIngest removes an ingest that will not become content, also after the end of ctx.
//
// containerd finds out at a time of its own that a writer has given up. It then writes
// into the ingest's folder once more (plugins/content/local, writer.Close), and a folder
// that is filled while it is emptied cannot be removed: "directory not empty". Nothing
// tells when that is over, so it is tried again; not where containerd itself has gone.
func abortIngest(ctx context.Context, store content.IngestManager, ref string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTimeout)
	defer cancel()
	for try := 1; ; try++ {
		err := store.Abort(ctx, ref)
		if err == nil || errdefs.IsNotFound(err) {
			return nil
		}
		if try == abortTries || errdefs.IsUnavailable(err) || ctx.Err() != nil {
			return fmt.Errorf("removing ingest %s: %w", ref, err)
		}
		time.Sleep(abortPause)
	}
}

// writeJSONBlob stores a document. Content that exists already is the same
// document; its labels are brought up to date.
func writeJSONBlob(ctx context.Context, store content.Store, mediaType string, v any, lbls map[string]string) (ocispec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if len(b) > maxJSON {
		return ocispec.Descriptor{}, fmt.Errorf("%s of %d bytes is larger than readers accept (%d): %w", mediaType, len(b), maxJSON, errdefs.ErrInvalidArgument)
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	ref := "cohort-json-" + rand.Text()
	if err := content.WriteBlob(ctx, store, ref, bytes.NewReader(b), desc, content.WithLabels(lbls)); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("writing %s: %w", mediaType, errors.Join(err, abortIngest(ctx, store, ref)))
	}
	if len(lbls) > 0 {
		fields := make([]string, 0, len(lbls))
		for k := range lbls {
			fields = append(fields, "labels."+k)
		}
		if _, err := store.Update(ctx, content.Info{Digest: desc.Digest, Labels: lbls}, fields...); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("labelling %s: %w", desc.Digest, err)
		}
	}
	return desc, nil
}

// pipeline hashes on one goroutine while it compresses on another, so that
// neither waits for the tar writer's reads. On a busy host it does one after the other, in
// small pieces.
type pipeline struct {
	ctx   context.Context
	free  chan []byte
	work  chan []byte
	cur   []byte
	done  chan error
	fail  chan struct{} // closed when the consumer has failed
	cause error
}

func newPipeline(ctx context.Context, h io.Writer, z io.Writer) *pipeline {
	p := &pipeline{
		ctx: ctx, free: make(chan []byte, chunks), work: make(chan []byte, chunks),
		done: make(chan error, 1), fail: make(chan struct{}),
	}
	for range chunks {
		p.free <- make([]byte, 0, chunkSize)
	}
	p.cur = <-p.free
	go p.consume(h, z)
	return p
}

func (p *pipeline) consume(h, z io.Writer) {
	hashes := make(chan []byte)
	hashed := make(chan struct{})
	go func() {
		for b := range hashes {
			_, _ = h.Write(b) // a hash takes everything
			hashed <- struct{}{}
		}
	}()
	var err error
	both := func(b []byte) {
		if pace.Busy(p.ctx) {
			_, _ = h.Write(b)
			_, err = z.Write(b)
			return
		}
		hashes <- b
		_, err = z.Write(b)
		<-hashed
	}
	for b := range p.work {
		for rest := b; len(rest) > 0 && err == nil; {
			n := len(rest)
			if pace.Busy(p.ctx) {
				n = min(n, pieceSize)
			}
			both(rest[:n])
			rest = rest[n:]
			pace.Pause(p.ctx)
		}
		if err != nil {
			p.cause = err
			close(p.fail)
			break
		}
		p.free <- b[:0]
	}
	close(hashes)
	p.done <- err
}

func (p *pipeline) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		k := copy(p.cur[len(p.cur):cap(p.cur)], b)
		p.cur, b = p.cur[:len(p.cur)+k], b[k:]
		if len(p.cur) == cap(p.cur) {
			if err := p.send(); err != nil {
				return n - len(b), err
			}
		}
	}
	return n, nil
}

func (p *pipeline) send() error {
	select {
	case p.work <- p.cur:
		p.cur = nil
	case <-p.fail:
		return p.cause
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
	select {
	case p.cur = <-p.free:
		return nil
	case <-p.fail:
		return p.cause
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}

// Close hands over what is left and waits for the consumer; it is called once.
func (p *pipeline) Close() error {
	var err error
	if len(p.cur) > 0 {
		err = p.send()
	}
	close(p.work)
	if cerr := <-p.done; cerr != nil {
		return cerr
	}
	return err
}

// chunkWriter makes large writes of a compressor's small ones: each is a message
// to containerd where the store is a client's.
type chunkWriter struct {
	w   io.Writer
	buf []byte
}

func (c *chunkWriter) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		k := copy(c.buf[len(c.buf):cap(c.buf)], b)
		c.buf, b = c.buf[:len(c.buf)+k], b[k:]
		if len(c.buf) == cap(c.buf) {
			if err := c.flush(); err != nil {
				return n - len(b), err
			}
		}
	}
	return n, nil
}

func (c *chunkWriter) flush() error {
	if len(c.buf) == 0 {
		return nil
	}
	_, err := c.w.Write(c.buf)
	c.buf = c.buf[:0]
	return err
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}
